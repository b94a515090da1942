"""`perceptio label` over many pictures: `python benchmarks/label_throughput.py --out RESULTS.json` (needs Ray).

A random small Depth Anything in its stock layout labels rendered scenes: one process, two workers of Ray, and two of
which one is killed in the middle; then one process that is killed and goes on. All must give equal rows and maps. Said
are pictures per second, the most memory of the process for a tenth of the pictures and for all, and how often rules
that do not look at the picture are right about the questions that are asked of the labels.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from perceptio_hf import DepthVQVAE, DepthVQVAEConfig
from perceptio_hf.files import out_file, write_json
from perceptio_hf.labelling.labels import read_rows
from perceptio_hf.world import render_scene


def save_teacher(folder: Path) -> None:
    """Depth Anything V2's architecture, 0.1 million random parameters, pictures of 70 pixels."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

    stages = [f"stage{number}" for number in (1, 2, 3, 4)]
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    shape = {"image_size": 70, "patch_size": 14, "reshape_hidden_states": False}
    config = DepthAnythingConfig(
        backbone_config=Dinov2Config(**sizes, **shape, out_features=stages, apply_layernorm=True),
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        head_hidden_size=8,
    )
    torch.manual_seed(0)
    model = DepthAnythingForDepthEstimation(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.4 / parameter[0].numel() ** 0.5)
            elif name == "head.conv3.bias":
                parameter.fill_(3.0)  # above the ReLU that ends it
    model.save_pretrained(folder)
    size = {"height": 70, "width": 70}
    DPTImageProcessor(size=size, keep_aspect_ratio=True, ensure_multiple_of=14).save_pretrained(folder)


def render(folder: Path, count: int) -> None:
    """Scenes of three shapes, and one file that is no picture."""
    folder.mkdir()
    for number in range(count - 1):
        picture = Image.fromarray(render_scene(number, size=96).image)
        shape = ((96, 96), (96, 72), (72, 96))[number % 3]
        picture.crop((0, 0, *shape)).save(folder / f"{number:05d}.jpg", quality=90)
    (folder / "broken.jpg").write_bytes(b"no picture")


def command(parts: Path, out: str, *options: str) -> list[str]:
    given = ["--teacher", str(parts / "teacher"), "--depth-codec", str(parts / "codec"), "--out", str(parts / out)]
    words = [sys.executable, "-m", "perceptio_hf", "label", str(parts / "photos"), *given]
    return [*words, "--maps", "--json", *options]


def label(parts: Path, out: str, *options: str) -> dict[str, Any]:
    begin = time.monotonic()
    done = subprocess.run(command(parts, out, *options), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout)
    keys = ("labelled", "failed", "fresh", "pictures_per_second")
    return {key: found[key] for key in keys if key in found} | {"seconds_in_all": round(time.monotonic() - begin, 1)}


def lines(parts: Path, out: str) -> int:
    try:
        return (parts / out / "journal" / "labels.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def kill_a_worker(parts: Path, out: str, after: int, killed: list[int]) -> None:
    """Kill one of the processes that work for us in the Ray we started, as soon as so many pictures are done."""
    while lines(parts, out) < after:
        time.sleep(0.05)
    for process in [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]:
        if b"_RayWorker" in _read(process, "cmdline") and _is_below(process):
            os.kill(process, signal.SIGKILL)
            killed.append(lines(parts, out))
            return


def _is_below(process: int) -> bool:
    """Whether this script started a process, or one that started it."""
    while process > 1:
        process = int((_read(process, "stat").rpartition(b") ")[2].split() or [b"0", b"0"])[1])
        if process == os.getpid():
            return True
    return False


def _read(process: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{process}/{name}").read_bytes()
    except OSError:  # it has just ended
        return b""


def kill_the_process(parts: Path, out: str, after: int) -> int:
    """Start labelling, kill the whole process once so many pictures are done; how many were."""
    process = subprocess.Popen(command(parts, out), stdout=subprocess.DEVNULL)
    while lines(parts, out) < after:
        time.sleep(0.05)
    process.kill()
    process.wait()
    return lines(parts, out)


def differences(parts: Path, out: str) -> int:
    """Rows and maps that differ from those of one process."""
    one, other = (read_rows(parts / name).remove_columns("image") for name in ("one", out))
    rows = abs(len(one) - len(other)) + sum(a != b for a, b in zip(one, other, strict=False))
    maps = sum(
        path.read_bytes() != (parts / out / path.relative_to(parts / "one")).read_bytes()
        for path in (parts / "one" / "depth").rglob("*.png")
    )
    return rows + maps


def questions(parts: Path) -> dict[str, Any]:
    """What the labels of one process are asked: how many questions of each kind, chance, and rules without sight."""
    done = subprocess.run(
        command(parts, "one", "--questions", "closest,order"), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)["questions"]["kinds"]


def memory(parts: Path) -> dict[str, float]:
    """The most that the process takes while it labels a tenth of the pictures, and all of them, in MB."""
    program = (
        "import resource, sys; from perceptio_hf.commands.main import run; code = run(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(code)"
    )
    found = {}
    pictures = sorted((parts / "photos").glob("0*.jpg"))
    for name, count in (("a_tenth", len(pictures) // 10), ("all", len(pictures))):
        (parts / f"{name}.txt").write_text("\n".join(map(str, pictures[:count])))
        words = command(parts, f"memory_{name}")[3:]
        words[1] = str(parts / f"{name}.txt")
        words.remove("--maps")
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
        found[name] = round(int(done.stderr.split()[-1]) / 1024, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--out", type=out_file, help="JSON file for the results")
    options = parser.parse_args()
    results: dict[str, Any] = {"pictures": options.pictures, "processors": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        parts = Path(folder)
        save_teacher(parts / "teacher")
        DepthVQVAE(DepthVQVAEConfig(image_size=128, downsample=16, code_dim=32, base_channels=8)).save_pretrained(
            parts / "codec"
        )
        render(parts / "photos", options.pictures)

        def note(name: str, found: dict[str, Any], out: str) -> None:
            results[name] = found | {"rows_and_maps_that_differ": differences(parts, out)}
            print(name, json.dumps(results[name]), flush=True)
            if options.out:
                write_json(options.out, results)

        two = ("--engine", "ray", "--workers", "2")
        note("one process", label(parts, "one"), "one")
        note("two workers", label(parts, "two", *two), "two")
        killed: list[int] = []
        killer = threading.Thread(
            target=kill_a_worker, args=(parts, "killed", options.pictures // 3, killed), daemon=True
        )
        killer.start()
        found = label(parts, "killed", *two)
        note("two workers, one killed", found | {"killed_after": killed[0] if killed else None}, "killed")
        after = kill_the_process(parts, "resumed", options.pictures // 2)
        note("one process, killed and started again", {"killed_after": after, **label(parts, "resumed")}, "resumed")
        results |= {"questions": questions(parts), "memory_mb": memory(parts)}
        print(results["questions"], results["memory_mb"])
    if options.out:
        write_json(options.out, results)


if __name__ == "__main__":
    main()
