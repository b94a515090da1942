"""The table of benchmarks, and the decorator with which a reader joins it.

A benchmark is one function: it reads the published files into samples. Around it stand its wording, the place it has on
the Hub and, unless answers are scored as for others, how they are scored. docs/extending.md adds one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from .reading import Request
from .sample import Sample, Spatial, Task

if TYPE_CHECKING:
    from perceptio_hf.processing.processing_perceptio import SpatialAnswer

Reader = Callable[[Request], Iterator[Sample]]


class Prompt(NamedTuple):
    """The wording of a benchmark's questions. Scores depend on it, so every summary records it.

    template: {expression}, {question}, {hint} and {options} are replaced by what the data say; source: of the wording.
    """

    template: str
    source: str


@dataclass(frozen=True)
class Scoring:
    """How the answers of a task are scored.

    Args:
        running: what the mean of `score` is, for progress and pictures of cases.
        score: what a record says of one answer, with "score" from 0 to 1, larger is better; a ValueError where the
            target cannot be read.
        total: the metrics over records, which have their "target" with them.
        headline: the metrics that stand for the benchmark; the first that a run has counts.
        hub_task: the name in the Hub's list of tasks.
        metrics: {metric: its name in reports and on cards}.
        shown: those of them that tables show, in this order; by default all.
        choices: whether answers take one of a sample's "choices", which is what replaced spans are scored by.
    """

    running: str
    score: "Callable[[Sample, SpatialAnswer], dict[str, Any]]"
    total: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]
    headline: tuple[str, ...]
    hub_task: str
    metrics: Mapping[str, str] = field(default_factory=dict)
    shown: tuple[str, ...] = ()
    choices: bool = False

    def __post_init__(self):
        object.__setattr__(self, "shown", self.shown or tuple(self.metrics))


@dataclass(frozen=True)
class BenchmarkInfo:
    """What is known of a benchmark before it is opened.

    Args:
        description: one line.
        files: what `path` is; None for what is rendered.
        task, spatial: as in `Benchmark`.
        splits: the usual ones, the default first; empty where there are none.
        prompt: the wording of its questions.
        hub: the Hub's id of the data, or ours, and its name on cards.
        read: the samples of a request, one by one.
    """

    description: str
    files: str | None
    task: Task
    spatial: Spatial
    splits: tuple[str, ...]
    prompt: Prompt
    hub: tuple[str, str]
    read: Reader


BENCHMARKS: dict[str, BenchmarkInfo] = {}
SCORINGS: dict[str, Scoring] = {}  # by task


def benchmark(
    name: str,
    description: str,
    *,
    files: str | None,
    prompt: Prompt,
    hub: tuple[str, str],
    spatial: Spatial,
    task: Task | None = None,
    scoring: Scoring | None = None,
    splits: tuple[str, ...] = (),
) -> Callable[[Reader], Reader]:
    """Register the reader below as a benchmark; see `BenchmarkInfo`.

    Args:
        task: how answers are scored, where that is as for others.
        scoring: how they are scored otherwise; the benchmark is then a task of its own name.
    """
    assert (task is None) != (scoring is None), "a benchmark has a task that is known, or a scoring of its own"
    assert name not in BENCHMARKS
    if scoring is not None:
        task = name
        SCORINGS[name] = scoring

    def register(read: Reader) -> Reader:
        BENCHMARKS[name] = BenchmarkInfo(description, files, task, spatial, splits, prompt, hub, read)
        return read

    return register
