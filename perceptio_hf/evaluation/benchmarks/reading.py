"""What every reader of a benchmark gets, and what it does with items that cannot be used."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

OnError = Literal["raise", "skip"]


@dataclass
class Faults:
    """Items of a benchmark that cannot be used: the first one stops the reading, or each is left out and noted.

    Only single items can be left out. What is wrong with a whole file or folder is always an error.
    """

    on_error: OnError = "raise"
    notes: list[str] = field(default_factory=list)

    def report(self, item: str, problem: str) -> None:
        """One unusable item.

        Raises:
            ValueError: naming it, unless such items are to be skipped.
        """
        if self.on_error == "raise":
            raise ValueError(f"{item}: {problem} (--on-error skip leaves such items out.)")
        self.notes.append(f"left out {item}: {problem}")

    @contextmanager
    def item(self, name: str) -> Iterator[None]:
        """A ValueError in the block is about the item `name`."""
        try:
            yield
        except ValueError as error:
            self.report(name, str(error))


@dataclass(frozen=True)
class Request:
    """What is to be read.

    Args:
        name: the benchmark.
        path: an existing file or folder; None for benchmarks that are rendered.
        split: which part; None where there are none, or for all of them.
        limit: how many samples are wanted at most; readers may ignore it.
        faults: where unusable items are reported.
        unit, pictures, depths, max_depth: of folders with depth, see `perceptio_hf.evaluation.benchmarks.depth_pairs`.
    """

    name: str
    path: Path | None
    split: str | None = None
    limit: int | None = None
    faults: Faults = field(default_factory=Faults)
    unit: str | None = None
    pictures: str | None = None
    depths: str | None = None
    max_depth: float | None = None
