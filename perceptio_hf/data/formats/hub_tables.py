"""Data sets of the Hub on disk: folders of .parquet files, or what `Dataset.save_to_disk` wrote.

Cells are read one by one as they are needed: a table of pictures is far larger than what is listed of it.
"""

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceptio_hf.extras import missing
from perceptio_hf.files import files_below

if TYPE_CHECKING:
    from datasets import Dataset

_SAVED = ("dataset_info.json", "dataset_dict.json")
_ALIASES = {"val": ("val", "validation"), "validation": ("validation", "val")}


def is_hub_table(path: Path) -> bool:
    """Whether `open_table` can read `path`."""
    if path.is_file():
        return path.suffix == ".parquet"
    return any((path / name).is_file() for name in _SAVED) or any(map(_is_parquet, files_below(path)))


def open_table(path: Path, split: str) -> "HubTable":
    """The rows of one split.

    Args:
        path: a folder of `datasets`, with `val-00000-of-00001.parquet`, `val/*.parquet` and the like somewhere below
            it, or saved by `save_to_disk`; or one .parquet file, whatever its split.
        split: "val" and "validation" are the same.

    Raises:
        ValueError: for a place without such files or without the split, or a damaged file.
        ImportError: where `datasets` (which brings pyarrow) is not installed.
    """
    if any((path / name).is_file() for name in _SAVED):
        return _SavedTable(path, split)
    files = [path] if path.is_file() else _files_of_split(path, split)
    return _ParquetTable(files)


class HubTable(ABC):
    """Rows by number.

    columns: their names. Pictures are cells {"bytes": ..., "path": ...}.
    place: where row `number` stands, with the size of its file, for messages and the data hash.
    """

    columns: list[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def cell(self, row: int, column: str) -> Any: ...

    @abstractmethod
    def place(self, row: int) -> str: ...

    def rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The given columns of all rows in order."""
        for row in range(len(self)):
            yield {column: self.cell(row, column) for column in columns}

    def check_columns(self, needed: Sequence[str], example: str) -> None:
        """Raises ValueError naming columns that are missing."""
        missing = [column for column in needed if column not in self.columns]
        if missing:
            raise ValueError(
                f"{self.place(0)} has the columns {', '.join(self.columns)}; {', '.join(missing)} is missing. Expected "
                f"the columns of {example}."
            )


def picture_bytes(cell: Any, place: str) -> bytes:
    """The file in a cell of pictures.

    Raises:
        ValueError: for a cell that holds none.
    """
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes) or not data:
        raise ValueError(f"{place} holds no bytes of a picture; take a copy of the data set with its pictures in it.")
    return data


class _ParquetTable(HubTable):
    def __init__(self, files: Sequence[Path]):
        self._open, self._paths, self._lock = _pyarrow_parquet().ParquetFile, list(files), threading.Lock()
        try:
            opened = [self._open(file) for file in files]
        except Exception as error:  # pyarrow's own kinds, and OSError
            raise ValueError(f"{files[0]}: not a .parquet file that can be read ({error}); copy it again.") from None
        self._names = [f"{file.name} ({file.stat().st_size} bytes)" for file in files]
        self.columns = list(opened[0].schema_arrow.names)
        self._groups = [  # (file, group, first row) of every group of rows
            (number, group, file.metadata.row_group(group).num_rows)
            for number, file in enumerate(opened)
            for group in range(file.metadata.num_row_groups)
        ]
        self._read = lru_cache(maxsize=len(self.columns))(self._read_group)

    def __len__(self) -> int:
        return sum(rows for _, _, rows in self._groups)

    def cell(self, row: int, column: str) -> Any:
        number, group, _, offset = self._find(row)
        with self._lock:  # also while a group is read: threads miss it together
            values = self._read(number, group, column)
        return values[offset].as_py()

    def place(self, row: int) -> str:
        number, _, before, offset = self._find(row)
        return f"{self._names[number]}, row {before + offset}"

    def _find(self, row: int) -> tuple[int, int, int, int]:
        """(file, group, rows before the group in its file, row in the group)."""
        before, last = 0, 0
        for number, group, rows in self._groups:
            before, last = (0, number) if number != last else (before, last)
            if row < rows:
                return number, group, before, row
            row, before = row - rows, before + rows
        raise IndexError(row)

    def _read_group(self, number: int, group: int, column: str) -> Any:
        try:  # a file that several threads have read from is no longer safe to read from
            return self._open(self._paths[number]).read_row_group(group, columns=[column]).column(column)
        except Exception as error:  # pyarrow's own kinds, and OSError
            raise ValueError(f"{self._names[number]} is damaged ({error}); copy it again.") from None


class _SavedTable(HubTable):
    def __init__(self, path: Path, split: str):
        from perceptio_hf.data.rows import import_datasets

        datasets = import_datasets()
        try:
            dataset = datasets.load_from_disk(str(path))
        except Exception as error:  # missing shards, damaged files
            raise ValueError(f"{path} cannot be read as a saved data set ({error}).") from None
        if isinstance(dataset, datasets.DatasetDict):
            dataset = dataset[_split_in(list(dataset), split, path)]
        elif dataset.split is not None:  # one part of a data set, saved by itself, that knows which
            _split_in([split_name(dataset)], split, path)
        self._data = dataset.data  # memory-mapped; pictures in it are not decoded
        self.columns = dataset.column_names
        size = sum(Path(file["filename"]).stat().st_size for file in dataset.cache_files)
        self._name = f"{path.name} ({size} bytes)"

    def __len__(self) -> int:
        return self._data.num_rows

    def cell(self, row: int, column: str) -> Any:
        return self._data.column(column)[row].as_py()

    def place(self, row: int) -> str:
        return f"{self._name}, row {row}"


def split_name(dataset: "Dataset") -> str:
    """Which split a data set is (of), without the range that was taken: "train" for "train[:1000]"."""
    return str(dataset.split).partition("[")[0]


def _is_parquet(path: Path) -> bool:
    return path.suffix == ".parquet"


def _files_of_split(path: Path, split: str) -> list[Path]:
    """The .parquet files whose name starts with the split, or that lie in a folder of its name."""
    names = _ALIASES.get(split, (split,))
    pattern = re.compile(rf"(?:{'|'.join(map(re.escape, names))})(?:[-._]\d.*)?\.parquet")
    every = sorted(filter(_is_parquet, files_below(path)))
    files = [file for file in every if pattern.fullmatch(file.name) or file.parent.name in names]
    if not files:
        raise ValueError(
            f"{path} has no .parquet files of the split {split!r}, such as {split}-00000-of-00001.parquet; it has "
            f"{', '.join(file.name for file in every[:5])}."
        )
    return files


def _split_in(known: list[str], split: str, path: Path) -> str:
    for name in _ALIASES.get(split, (split,)):
        if name in known:
            return name
    raise ValueError(f"{path} has no split {split!r}; it has {', '.join(known)}.")


def _pyarrow_parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise missing(error, "Reading .parquet files") from error
    return parquet
