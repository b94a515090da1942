"""The order in which items are worked on: pictures of about the same size together, for batches with little padding."""

import hashlib
import json
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from perceptio_hf.files import write_text

WINDOW = 512  # items that are ordered among themselves: results come near the order of the input


def order_by_size(sizes: Sequence[int], groups: Sequence[Hashable]) -> list[int]:
    """Places of items: within each window by group, and within a group the largest first.

    Args:
        sizes: of each item, in any unit.
        groups: items of different groups cannot share a batch.
    """
    order: list[int] = []
    for start in range(0, len(sizes), WINDOW):
        window = range(start, min(start + WINDOW, len(sizes)))
        order += sorted(window, key=lambda place: (str(groups[place]), -sizes[place], place))
    return order


def cut(order: Sequence[int], groups: Sequence[Hashable], batch_size: int) -> list[list[int]]:
    """The order in batches of one group each."""
    batches: list[list[int]] = []
    for place in order:
        if batches and len(batches[-1]) < batch_size and groups[batches[-1][0]] == groups[place]:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def read_order(path: Path, items: str) -> tuple[list[int] | None, list[int | None]]:
    """The order that an earlier run over the same items wrote, None where there is none, and how large their files were
    then, where it says so.

    It is kept, since a picture that is mended between two runs would move to another place, and the lines behind it
    with it.

    Args:
        items: what tells the items from others (see `digest`).
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return (kept["order"], kept.get("sizes", [])) if kept["items"] == items else (None, [])
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None, []


def write_order(path: Path, items: str, order: Sequence[int], sizes: Sequence[int | None] = ()) -> None:
    """For `read_order`."""
    write_text(path, json.dumps({"items": items, "order": list(order), "sizes": list(sizes)}) + "\n")


def digest(rows: Iterable[Any]) -> str:
    """SHA-256 over what JSON can hold, in order."""
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return total.hexdigest()
