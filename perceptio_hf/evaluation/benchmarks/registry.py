"""The one way to open a benchmark. All readers in this folder are imported here, and so register themselves."""

import importlib
import pkgutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from perceptio_hf.files import expanded

from .reading import Faults, OnError, Request
from .registration import BENCHMARKS, BenchmarkInfo
from .sample import Benchmark, Sample

_FIRST = ("referring", "hardblink", "blink", "tables", "depth_pairs", "world")  # in the order in which they are listed
_found = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
for _name in dict.fromkeys((*_FIRST, *_found)):
    importlib.import_module(f".{_name}", __package__)


def open_benchmark(
    name: str,
    path: str | Path | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    on_error: OnError = "raise",
    unit: str | None = None,
    pictures: str | None = None,
    depths: str | None = None,
    max_depth: float | None = None,
) -> Benchmark:
    """List the samples of a benchmark. No picture is decoded.

    Args:
        name: one of `BENCHMARKS`.
        path: where the published files are; not for rendered benchmarks.
        split: which part; None takes the benchmark's default.
        limit: at most so many samples, the first ones; rendered benchmarks have 200 unless told otherwise.
        on_error: what to do with single items that cannot be used; what was left out is in `Benchmark.notes`.
        unit, pictures, depths, max_depth: only for "depth": what the depth maps hold
            (`perceptio_hf.data.depth_maps.UNITS`), patterns of the two kinds of files, in which * stands for the name
            that they share, and the distance in metres beyond which readings do not count.

    Raises:
        ValueError: for an unknown name, files that are missing or contradict one another, or no sample at all.
        ImportError: where an extra package is needed, naming it.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"There is no benchmark {name!r}; choose from {', '.join(BENCHMARKS)}.")
    info = BENCHMARKS[name]
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}; use raise or skip.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be 1 or more.")
    if name != "depth" and (unit or pictures or depths or max_depth):
        raise ValueError("a unit, patterns of files and a largest distance are for the benchmark `depth` only.")
    if max_depth is not None and not max_depth > 0:
        raise ValueError(f"max_depth is {max_depth}; it must be above 0 metres.")
    faults = Faults(on_error)
    chosen = _chosen_split(name, info, split)
    request = Request(name, _checked_path(name, info, path), chosen, limit, faults, unit, pictures, depths, max_depth)
    samples = list(islice(_distinct(info.read(request), faults), limit))
    if not samples:
        raise ValueError(
            f"{name}{f', split {chosen}' if chosen else ''}: no sample can be used. " + "; ".join(faults.notes[:3])
        )
    template = info.prompt.template
    return Benchmark(name, info.task, info.spatial, template, chosen or "all", samples, tuple(faults.notes))


def _checked_path(name: str, info: BenchmarkInfo, path: str | Path | None) -> Path | None:
    if info.files is None:
        if path is not None:
            raise ValueError(f"{name} is rendered and takes no path; leave {path} out.")
        return None
    if path is None:
        raise ValueError(f"{name} needs a path: {info.files}.")
    path = expanded(path)
    if not path.exists():
        raise ValueError(f"There is no {path}; {name} needs {info.files}.")
    return path


def _chosen_split(name: str, info: BenchmarkInfo, split: str | None) -> str | None:
    if split is not None and not info.splits:
        raise ValueError(f"{name} has no splits; leave out {split!r}.")
    return split or (info.splits[0] if info.splits else None)


def _distinct(samples: Iterator[Sample], faults: Faults) -> Iterator[Sample]:
    seen = set()
    for sample in samples:
        if sample.id in seen:
            faults.report(sample.id, "this id occurs twice; every sample needs an id of its own.")
            continue
        seen.add(sample.id)
        yield sample
