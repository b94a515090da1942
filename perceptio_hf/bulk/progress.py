"""A bar on standard error while long work goes on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Watch = Callable[[str, int, int, str], None]  # what is done, how many of how many, a few words about it so far


@contextmanager
def progress(unit: str = "") -> Iterator[Watch]:
    """A bar for each stage, with the time left and, where a unit is named, how many of them a second; nothing where
    standard error is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def watch(stage: str, done: int, total: int, words: str) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, words=words)
            speed = bar.tasks[tasks[stage]].speed
            rate = f"{speed:.3g} {unit}/s " if unit and speed else ""
            bar.update(tasks[stage], completed=done, words=rate + words)

        yield watch
