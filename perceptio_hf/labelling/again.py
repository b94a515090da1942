"""What is done once more where a folder of labels is given the same pictures again."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from perceptio_hf.bulk.item import Item, file_sizes
from perceptio_hf.data.rows import import_datasets


class FetchedPictures:
    """Pictures that came from other machines: in files of their own until a run is complete, then in its rows."""

    def __init__(self, folder: Path, rows: Path):
        self.folder, self.rows = folder, rows

    def has(self, record: dict[str, Any]) -> bool:
        """Whether the picture that a line of the journal speaks of is there."""
        return (self.folder / record["fetched"]).is_file() or _name_of(record) in self._opened[1]

    def read(self, record: dict[str, Any]) -> bytes:
        """Its file."""
        path = self.folder / record["fetched"]
        if path.is_file():
            return path.read_bytes()
        rows, places = self._opened
        return rows[places[_name_of(record)]]["image"]["bytes"]

    @cached_property
    def _opened(self) -> tuple[Any, dict[tuple[str, int, int], int]]:
        datasets = import_datasets()
        if not self.rows.is_dir():
            return None, {}
        rows = datasets.load_from_disk(str(self.rows)).cast_column("image", datasets.Image(decode=False))
        names = zip(*(rows[name] for name in ("id", "width", "height")), strict=True)
        return rows, {name: place for place, name in enumerate(names)}


def _name_of(record: dict[str, Any]) -> tuple[str, int, int]:
    return record["id"], record["width"], record["height"]


class Outdated:
    """Whether a line of the journal is not what its picture would give: it failed, the picture's file has another size
    than it had, or what was fetched is gone.

    `lost` says whether that was true of a picture that had been labelled.
    """

    def __init__(self, items: Sequence[Item], fetched: FetchedPictures):
        self.items, self.fetched, self.lost = items, fetched, False

    def __call__(self, record: dict[str, Any]) -> bool:
        if "error" in record:
            return True
        if "fetched" in record:
            found = not self.fetched.has(record)
        else:
            found = record.get("bytes") is not None and record["bytes"] != self._sizes[record["index"]]
        self.lost |= found
        return found

    @cached_property
    def _sizes(self) -> list[int | None]:
        return file_sizes(self.items)
