"""Where batches are worked on: in this process, or by workers of Ray. The work itself is the same code.

    job (opens a worker: loads the model)     worker.read(batch)      in threads, ahead of the model
                                              worker.work(batch, read)  -> one `Result` for each item

An engine is given a job and batches, and yields their results in the order of the batches.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from perceptio_hf.files import replacing

from .journal import Journal

Batch = Sequence[Any]
_READERS = 4  # threads of a worker that read ahead; each holds a batch of prepared pictures


@dataclass(frozen=True)
class Result:
    """What became of one item.

    Args:
        record: its line in the journal, with the item's "id".
        files: {path below the folder of the results: content}. They come back from a worker with the record, so that
            machines need no disk in common, and are written before the line is. Whole, but the disk is not waited for:
            that would cost every picture, where a line's wait is a batch's. Only a power cut can tell.
    """

    record: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)


class Worker(Protocol):
    """Does the work of one process, model in hand."""

    def read(self, batch: Batch) -> Any:
        """What `work` needs of a batch, prepared without the model; called from several threads at once."""

    def work(self, batch: Batch, read: Any) -> list[Result]:
        """One result for each item, in their order; called from one thread."""


Job = Callable[[], Worker]  # for workers in other processes it must be one that pickle can send there


class Engine(Protocol):
    """Runs a job over batches."""

    def run(self, job: Job, batches: Sequence[Batch]) -> Iterator[list[Result]]:
        """The results of each batch, in the order of the batches, as they are done."""


class LocalEngine:
    """One worker, in this process."""

    def run(self, job: Job, batches: Sequence[Batch]) -> Iterator[list[Result]]:
        if batches:
            yield from work_through(job(), batches)


def open_engine(name: str, address: str | None = None, workers: int | None = None, device: str | None = None) -> Engine:
    """The engine that `--engine`, `--address` and `--workers` ask for; `--device` is one of its own machines'.

    Raises:
        ValueError: for options that the engine does not have.
        ImportError: where Ray is not installed.
    """
    if name == "ray":
        from .ray_engine import RayEngine

        return RayEngine(address, workers, device)
    if address is not None or workers not in (None, 1):
        option = "--address" if address is not None else "--workers"
        raise ValueError(f"{option} is for several workers, which Ray runs; add --engine ray.")
    return LocalEngine()


def work_through(worker: Worker, batches: Iterable[Batch]) -> Iterator[list[Result]]:
    """The results of each batch; what comes next is read meanwhile."""
    for batch, read in _read_ahead(worker.read, batches, readers()):
        yield worker.work(batch, read)


def readers() -> int:
    """Threads that read ahead: half of the processors this process may use, since the model needs some too."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_READERS, usable // 2))


def _read_ahead(read: Callable[[Batch], Any], batches: Iterable[Batch], threads: int) -> Iterator[tuple[Batch, Any]]:
    """(batch, what `read` made of it), in order; as many batches as there are threads are read ahead, no more.

    An error of `read` is raised where its batch's turn comes.
    """
    waiting: deque[tuple[Batch, Future]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="read-ahead") as pool:
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(read, batch)))
                if len(waiting) > threads:
                    yield _next(waiting)
            while waiting:
                yield _next(waiting)
        finally:
            for _, future in waiting:
                future.cancel()


def _next(waiting: "deque[tuple[Batch, Future]]") -> tuple[Batch, Any]:
    batch, future = waiting.popleft()
    return batch, future.result()


def fill_journal(
    journal: Journal,
    engine: Engine,
    job: Job,
    batches: Sequence[Batch],
    watch: Callable[[list[Result]], None] | None = None,
    folder: Path | None = None,
) -> int:
    """Do what the journal has no line of yet.

    A batch that was cut short is worked on as a whole once more, so that its items are computed as ever.

    Args:
        batches: all of the journal's items in its order, done or not.
        watch: given the new results of every batch, when they are written.
        folder: of the results' files; default: the journal's.

    Returns:
        How many lines were added.

    Raises:
        ValueError, OSError: as the job, or where results cannot be written.
    """
    before, place, first = journal.done, 0, 0
    while first < len(batches) and place + len(batches[first]) <= journal.done:
        place += len(batches[first])
        first += 1
    for results in engine.run(job, batches[first:]):
        fresh = results[max(0, journal.done - place) :]
        place += len(results)
        for result in fresh:
            _write_files(folder or journal.path.parent, result.files)
        journal.extend([result.record for result in fresh])
        if watch is not None:
            watch(fresh)
    return journal.done - before


def _write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
