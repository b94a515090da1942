"""Which benchmarks there are, what each expects on disk, and the one way to open them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from . import blink, depth_pairs, hardblink, referring, tables, world
from .prompts import PROMPTS
from .reading import Faults, OnError, Request
from .sample import Benchmark, Sample, Spatial, Task


@dataclass(frozen=True)
class BenchmarkInfo:
    """What is known of a benchmark before it is opened.

    Args:
        description: one line.
        files: what `path` is; None for what is rendered.
        task, spatial: as in `Benchmark`.
        splits: the usual ones, the default first; empty where there are none.
        read: the samples of a request, one by one.
    """

    description: str
    files: str | None
    task: Task
    spatial: Spatial
    splits: tuple[str, ...]
    read: Callable[[Request], Iterator[Sample]]


_REFS = "a folder with refs({by}).p, instances.json and COCO's train2014 pictures; or a Hub data set on disk"
_TSV = "VLMEvalKit's table {name}.tsv, pictures in base64"

BENCHMARKS: dict[str, BenchmarkInfo] = {
    "refcoco": BenchmarkInfo(
        "RefCOCO: segment what an expression refers to",
        _REFS.format(by="unc"),
        "referring_segmentation",
        "seg",
        ("val", "testA", "testB"),
        referring.read_refcoco,
    ),
    "refcoco+": BenchmarkInfo(
        "RefCOCO+: the same without words for places",
        _REFS.format(by="unc"),
        "referring_segmentation",
        "seg",
        ("val", "testA", "testB"),
        referring.read_refcoco,
    ),
    "refcocog": BenchmarkInfo(
        "RefCOCOg: the same with longer expressions",
        _REFS.format(by="umd"),
        "referring_segmentation",
        "seg",
        ("val", "test"),
        referring.read_refcoco,
    ),
    "grefcoco": BenchmarkInfo(
        "gRefCOCO: expressions that refer to several objects, or to none",
        "a folder with grefs(unc).json, instances.json and COCO's train2014 pictures",
        "referring_segmentation",
        "auto",
        ("val", "testA", "testB"),
        referring.read_grefcoco,
    ),
    "hardblink": BenchmarkInfo(
        "HardBLINK: which of 3 to 5 marked points is the closest to the camera",
        "the published folder with questions/, answers/ and images/",
        "relative_depth",
        "depth",
        ("all", "3", "4", "5"),
        hardblink.read_hardblink,
    ),
    "blink-depth": BenchmarkInfo(
        "BLINK's relative depth: which of two marked points is closer",
        "BLINK's folder Relative_Depth with .parquet files, or a Hub data set on disk",
        "relative_depth",
        "depth",
        ("val",),
        blink.read_blink_depth,
    ),
    "mmbench": BenchmarkInfo(
        "MMBench: multiple choice, with the rotated copies of each question",
        _TSV.format(name="MMBench_DEV_EN"),
        "multiple_choice",
        "none",
        ("all", "dev"),
        tables.read_tsv,
    ),
    "scienceqa": BenchmarkInfo(
        "ScienceQA: multiple choice, questions with a picture",
        _TSV.format(name="ScienceQA_TEST"),
        "multiple_choice",
        "none",
        ("all",),
        tables.read_tsv,
    ),
    "ai2d": BenchmarkInfo(
        "AI2D: multiple choice about diagrams",
        _TSV.format(name="AI2D_TEST"),
        "multiple_choice",
        "none",
        ("all",),
        tables.read_tsv,
    ),
    "depth": BenchmarkInfo(
        "Depth estimation on pictures with depth maps beside them",
        "a folder of pictures and depth maps, with --unit",
        "depth",
        "depth",
        (),
        depth_pairs.read_depth_pairs,
    ),
    "world-refer": BenchmarkInfo(
        "Rendered scenes: segment what an expression refers to",
        None,
        "referring_segmentation",
        "seg",
        (),
        world.read_refer,
    ),
    "world-closest": BenchmarkInfo(
        "Rendered scenes: which of 3 to 5 marked points is the closest; nothing but depth tells",
        None,
        "relative_depth",
        "depth",
        (),
        world.read_closest,
    ),
    "world-plain": BenchmarkInfo(
        "Rendered scenes: counts and attributes", None, "multiple_choice", "none", (), world.read_plain
    ),
    "world-depth": BenchmarkInfo("Rendered scenes: depth estimation", None, "depth", "depth", (), world.read_depths),
}


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
) -> Benchmark:
    """List the samples of a benchmark. No picture is decoded.

    Args:
        name: one of `BENCHMARKS`.
        path: where the published files are; not for rendered benchmarks.
        split: which part; None takes the benchmark's default.
        limit: at most so many samples, the first ones; rendered benchmarks have 200 unless told otherwise.
        on_error: what to do with single items that cannot be used; what was left out is in `Benchmark.notes`.
        unit, pictures, depths: only for "depth": what the depth maps hold ("mm", "m", "disparity" or "relative"),
            and patterns of the two kinds of files, in which * stands for the name that they share.

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
    if name != "depth" and (unit or pictures or depths):
        raise ValueError("a unit and patterns of files are for the benchmark `depth` only.")
    faults = Faults(on_error)
    chosen = _chosen_split(name, info, split)
    request = Request(name, _checked_path(name, info, path), chosen, limit, faults, unit, pictures, depths)
    samples = list(islice(_distinct(info.read(request), faults), limit))
    if not samples:
        raise ValueError(
            f"{name}{f', split {chosen}' if chosen else ''}: no sample can be used. " + "; ".join(faults.notes[:3])
        )
    template = PROMPTS[name].template
    return Benchmark(name, info.task, info.spatial, template, chosen or "all", samples, tuple(faults.notes))


def _checked_path(name: str, info: BenchmarkInfo, path: str | Path | None) -> Path | None:
    if info.files is None:
        if path is not None:
            raise ValueError(f"{name} is rendered and takes no path; leave {path} out.")
        return None
    if path is None:
        raise ValueError(f"{name} needs a path: {info.files}.")
    path = Path(path).expanduser()
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
