"""What a CPU cannot show of Perceptio on a GPU, in one command.

    python benchmarks/gpu.py --out DIR                            on a CUDA machine, within 8 minutes
    python benchmarks/gpu.py --out DIR --device cpu --quick       everything tiny, to see that it runs

Parts run one after another in the order of their value, each in a process of its own, which is stopped when it takes
far too long; one that fails is recorded with its error and hinders no other. A part that no longer fits into
`--minutes` is recorded as left out. One that needs no GPU (`memory`) runs beside them, on one thread.
`DIR/gpu.json` is written anew after every part and holds, for every part, its cases, its seconds and its state: done,
failed, stopped or left out; a table of them is printed at the end. The cases of a part that is running are in
`DIR/PART.partial.json`.

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
from collections.abc import Iterable
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
    torch.manual_seed(0)
    PARTS[name].run(setup, Record(path))


class Running:
    """A part in a forked process of its own; what it records and prints lies in `out` and in `scratch`."""

    def __init__(self, name: str, setup: Setup, out: Path, scratch: Path):
        # Records lie in `out`, so that the cases of a part stay when all of this is killed.
        self.path, self.log, self.begun = out / f"{name}.partial.json", scratch / f"{name}.log", time.monotonic()
        self.state = None
        sys.stdout.flush()
        self.child = os.fork()
        if self.child == 0:
            self._run(name, setup)

    def _run(self, name: str, setup: Setup) -> None:
        os.setsid()  # so that it can be stopped with all that it has started
        target = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1), os.dup2(target, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        status = 1
        if not setup.is_cuda:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # no context, no memory, and nothing chosen by what the GPU can do
        try:
            if setup.is_cuda and torch.cuda._is_in_bad_fork():  # some import has started CUDA: begin from nothing
                alone = ["--part", name, str(self.path), "--device", str(setup.device), *(["--quick"] * setup.quick)]
                os.execv(sys.executable, [sys.executable, __file__, *alone])
            run_part(name, setup, self.path)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)

    def poll(self) -> bool:
        """Whether it has ended."""
        if self.state is None:
            done, status = os.waitpid(self.child, os.WNOHANG)
            if done:
                self._end("done" if status == 0 else "failed")
        return self.state is not None

    def wait(self, limit: float, beside: Iterable["Running"] = ()) -> None:
        """Until it has ended; stopped after `limit` seconds from its beginning. Sees when those `beside` it end."""
        while not self.poll():
            if time.monotonic() - self.begun >= limit:
                return self.stop()
            for other in beside:
                other.poll()
            time.sleep(0.05)

    def stop(self) -> None:
        os.killpg(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)
        self._end("stopped")

    def _end(self, state: str) -> None:
        self.state, self.seconds = state, round(time.monotonic() - self.begun, 2)

    def found(self) -> dict:
        """What it recorded, once it has ended."""
        found = {"state": self.state, "seconds": self.seconds}
        found["cases"] = json.loads(self.path.read_text()) if self.path.exists() else {}
        for left_behind in self.path.parent.glob(f"{self.path.stem}.*"):
            left_behind.unlink()
        if self.state != "done":
            found["log"] = self.log.read_text(errors="replace")[-3000:].splitlines() if self.log.exists() else []
        return found


def run_all(names: list[str], setup: Setup, minutes: float, out: Path, broken: list[str]) -> dict:
    """All parts that fit -> the document, which is also in `out`/gpu.json; `broken`: see `load_parts`."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    document = {"device": str(setup.device), "quick": setup.quick, "minutes": minutes, "parts": {}}

    def add(name: str, found: dict) -> None:
        parts = document["parts"] | {name: found}
        document["parts"] = {name: parts[name] for name in names if name in parts}
        document["seconds"] = round(time.monotonic() - started, 1)
        write(out / "gpu.json", document)
        failed = sum("error" in case for case in found.get("cases", {}).values())
        note = f", {failed} cases failed" if failed else ""
        print(f"{name}: {found['state']}, {found.get('seconds', 0):.1f} s{note}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        host = Setup(torch.device("cpu"), setup.quick)
        # Beside the others only where those are on another device: two parts on one processor would spoil both.
        beside = {
            name: Running(name, host, out, Path(scratch))
            for name in names
            if setup.is_cuda and name in PARTS and PARTS[name].on_host
        }
        try:
            for name in names:
                if name in beside:
                    continue
                left = 60 * minutes - (time.monotonic() - started)
                if name not in PARTS:
                    add(name, {"state": "failed", "log": broken})
                elif not setup.quick and left < PARTS[name].seconds:
                    expected = PARTS[name].seconds
                    add(name, {"state": "left out", "seconds_expected": expected, "seconds_left": round(left, 1)})
                else:
                    expected = 2.5 * PARTS[name].seconds + SLACK
                    limit = (min(left, expected) if len(names) > 1 else left) + GRACE  # one alone may take all there is
                    running = Running(name, setup, out, Path(scratch))
                    running.wait(limit, beside.values())
                    add(name, running.found())
            for name, running in beside.items():
                running.wait(60 * minutes + GRACE)
                add(name, running.found())
        finally:
            for running in beside.values():
                if running.state is None:
                    running.stop()
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
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
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
