"""What a CPU cannot show of Perceptio on a GPU, in one command.

    python benchmarks/gpu.py --out DIR                            on a CUDA machine, within 5 minutes
    python benchmarks/gpu.py --out DIR --device cpu --quick       everything tiny, to see that it runs

Parts run one after another in the order of their value, each in a process of its own, which is stopped when it takes
far too long; one that fails is recorded with its error and hinders no other. A part that no longer fits into
`--minutes` is recorded as left out. `DIR/gpu.json` is written anew after every part and holds, for every part, its
cases, its seconds and its state: done, failed, stopped or left out; a table of them is printed at the end. The cases of
the part that is running are in `DIR/PART.partial.json`.

`memory` and `trainer` need TRL and datasets. `memory` predicts what `training` finds, needs no GPU and can be run
elsewhere:

    python benchmarks/gpu.py --out DIR --device cpu --only memory

Weights are random, but for `generation_tiny`, and nothing is downloaded; `gpu_parts` says what is measured.
"""

import argparse
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Whether there is a GPU is asked without starting CUDA, which would not survive the fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from gpu_parts.tools import PARTS, Record, Setup  # noqa: E402

# By value, the most telling first.
ORDER = (
    "environment",
    "generation_tiny",
    "generation_1b",
    "training",
    "memory",
    "trainer",
    "grammar",
    "masks",
    "codec",
    "labels",
    "compiled_tiny",
    "compiled",
    "fsdp",
    "device_map",
    "attention",
    "compiled_1b",
)
# Seconds: a part may take SLACK and some more than was expected, and GRACE beyond what is left, so that a good one is
# not cut at its end.
SLACK, GRACE = 30.0, 20.0


def load_parts() -> list[str]:
    """Register the parts; also loads what all of them import, once, before processes are forked.

    Returns:
        What could not be imported, as the last lines of its traceback; the other parts are there.
    """
    broken = []
    for module in ("generation", "loops", "pictures", "training"):
        try:
            importlib.import_module(f"gpu_parts.{module}")
        except Exception:
            broken += [f"gpu_parts.{module}:", *traceback.format_exc().splitlines()[-8:]]
    return broken


def run_part(name: str, setup: Setup, path: Path) -> None:
    """One part in this process; its exception ends the process with its traceback."""
    if setup.is_cuda:
        torch.cuda.set_device(setup.device.index or 0)
    else:
        torch.set_num_threads(1)
    PARTS[name].run(setup, Record(path))


def in_process(name: str, setup: Setup, path: Path, log: Path, limit: float) -> str:
    """One part in a forked process of its own; returns done, failed or stopped."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setsid()  # so that it can be stopped with all that it has started
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1), os.dup2(target, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        status = 1
        try:
            if setup.is_cuda and torch.cuda._is_in_bad_fork():  # some import has started CUDA: begin from nothing
                alone = ["--part", name, str(path), "--device", str(setup.device), *(["--quick"] * setup.quick)]
                os.execv(sys.executable, [sys.executable, __file__, *alone])
            run_part(name, setup, path)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    started = time.monotonic()
    while time.monotonic() - started < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "done" if status == 0 else "failed"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "stopped"


def run_all(names: list[str], setup: Setup, minutes: float, out: Path, broken: list[str]) -> dict:
    """All parts that fit -> the document, which is also in `out`/gpu.json; `broken`: see `load_parts`."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    document = {"device": str(setup.device), "quick": setup.quick, "minutes": minutes, "parts": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            left = 60 * minutes - (time.monotonic() - started)
            if name not in PARTS:
                found = {"state": "failed", "log": broken}
            elif not setup.quick and left < PARTS[name].seconds:
                found = {"state": "left out", "seconds_expected": PARTS[name].seconds, "seconds_left": round(left, 1)}
            else:
                # In `out`, so that the cases of a part stay when all of this is killed.
                path, log, begun = out / f"{name}.partial.json", Path(scratch, f"{name}.log"), time.monotonic()
                expected = 2.5 * PARTS[name].seconds + SLACK
                limit = (min(left, expected) if len(names) > 1 else left) + GRACE  # one alone may take all there is
                state = in_process(name, setup, path, log, limit)
                found = {"state": state, "seconds": round(time.monotonic() - begun, 2)}
                found["cases"] = json.loads(path.read_text()) if path.exists() else {}
                for left_behind in out.glob(f"{name}.partial.*"):
                    left_behind.unlink()
                if state != "done":
                    found["log"] = log.read_text(errors="replace")[-3000:].splitlines() if log.exists() else []
            document["parts"][name] = found
            document["seconds"] = round(time.monotonic() - started, 1)
            write(out / "gpu.json", document)
            failed = sum("error" in case for case in found.get("cases", {}).values())
            note = f", {failed} cases failed" if failed else ""
            print(f"{name}: {found['state']}, {found.get('seconds', 0):.1f} s{note}", flush=True)
    return document


def write(path: Path, document: dict) -> None:
    fresh = path.with_suffix(".fresh")
    fresh.write_text(json.dumps(document, indent=1, default=str) + "\n")
    os.replace(fresh, path)


def table(document: dict) -> str:
    """A line for every case: its figures, or its error."""
    lines = []
    for name, found in document["parts"].items():
        for case, figures in found.get("cases", {}).items():
            shown = {key: value for key, value in figures.items() if key not in ("traceback", "case_seconds")}
            values = ", ".join(f"{key} {_short(value)}" for key, value in shown.items())
            lines.append(f"{name} | {case} | {values}")
        for line in found.get("log", [])[-6:]:
            lines.append(f"{name} | {found['state']} | {line}")
    return "\n".join(lines)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder for gpu.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one repeat")
    parser.add_argument("--minutes", type=float, default=5.0, help="for all parts together")
    parser.add_argument("--only", help="parts, separated by commas; default: all. " + ", ".join(ORDER))
    parser.add_argument("--part", nargs=2, metavar=("NAME", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(ORDER)
    unknown = sorted(set(names) - set(ORDER))
    if unknown:
        parser.error(f"--only names {unknown[0]!r}; the parts are {', '.join(ORDER)}.")
    setup = Setup(torch.device(options.device), options.quick)
    broken = load_parts()
    if options.part:
        run_part(options.part[0], setup, Path(options.part[1]))
        return
    document = run_all(names, setup, options.minutes, options.out, broken)
    print(table(document))


if __name__ == "__main__":
    main()
