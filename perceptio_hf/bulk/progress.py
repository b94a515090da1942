"""How long work goes on standard error: a bar on a terminal, now and then a line where a log is kept."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

Item = TypeVar("Item")
Watch = Callable[[str, float, float, str], None]  # what is done, how much of how much, a few words about it so far
LOGGED_EVERY = 30.0  # seconds; what takes less says nothing


@contextmanager
def progress(unit: str = "") -> Iterator[Watch]:
    """Show each stage with the time left and, where a unit is named, how many of them a second. Whole numbers are
    counted; of a total that is a float the share is shown."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Log(unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def watch(stage: str, done: float, total: float, words: str) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, amount="", words="")
            speed = bar.tasks[tasks[stage]].speed
            rate = f"{speed:.3g} {unit}/s " if unit and speed else ""
            bar.update(tasks[stage], completed=done, amount=_amount(done, total), words=rate + words)

        yield watch


def tracked(items: Sequence[Item], stage: str, unit: str = "") -> Iterator[Item]:
    """The items, one after another, with `progress`."""
    with progress(unit) as watch:
        for number, item in enumerate(items):
            watch(stage, number, len(items), "")
            yield item


class _Log:
    """Lines such as `labelling: 12,800 of 100,000, 24.8 pictures/s, 0:58:36 left`."""

    def __init__(self, unit: str):
        self.unit = unit
        self.started: dict[str, tuple[float, float]] = {}  # when each stage began, and what was done by then
        self.logged = time.monotonic()

    def __call__(self, stage: str, done: float, total: float, words: str) -> None:
        now = time.monotonic()
        began, before = self.started.setdefault(stage, (now, done))
        if now - self.logged < LOGGED_EVERY:
            return
        self.logged = now
        parts = [f"{stage}: {_amount(done, total)}"]
        if done > before:
            speed = (done - before) / (now - began)
            parts += [f"{speed:.3g} {self.unit}/s"] if self.unit else []
            parts.append(f"{timedelta(seconds=round((total - done) / speed))} left")
        print(", ".join([*parts, *([words] if words else [])]), file=sys.stderr, flush=True)


def _amount(done: float, total: float) -> str:
    return f"{done / total:.1%}" if isinstance(total, float) else f"{done:,} of {total:,}"
