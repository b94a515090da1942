"""Pictures inside of larger files: tar shards in WebDataset's form, parquet, data sets that `datasets` saved.

Each is found by a small place that any process can open again; nothing is unpacked.
"""

import os
import posixpath
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from perceptio_hf.data.lines import SCHEMES
from perceptio_hf.data.rows import import_datasets, without_decoding
from perceptio_hf.extras import missing

from .order import WINDOW

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

TAR_SUFFIX, PARQUET_SUFFIX = ".tar", ".parquet"
_NAMED = ("picture", "image", "images")  # columns that hold pictures
_ROWS = 1000  # of a table's plain columns at a time
_MOST_BYTES = 1 << 29  # of pictures of row groups that are held


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file inside of a tar file: where its bytes lie."""

    file: str
    name: str
    offset: int
    size: int

    def encoded(self) -> dict[str, Any]:
        """The picture as `datasets` keeps them: {"bytes": ..., "path": ...}.

        Raises:
            ValueError: where the file is shorter than it was when it was listed.
        """
        data = self.read(self.size)
        if len(data) != self.size:
            raise ValueError(f"the tar file ends after {len(data):,} of its {self.size:,} bytes.")
        return {"bytes": data, "path": self.name}

    def read(self, most: int) -> bytes:
        """Its first bytes."""
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return file.read(min(most, self.size))


@dataclass(frozen=True, slots=True)
class ParquetRow:
    """A row of a parquet file, by its row group and its place in that."""

    file: str
    group: int
    place: int

    def encoded(self) -> Any:
        """As `TarMember.encoded`, or a path; relative ones are seen from the folder of the file."""
        return _located(_only(_groups.pictures(self.file, self.group)[self.place].as_py()), os.path.dirname(self.file))


@dataclass(frozen=True, slots=True)
class SavedRow:
    """A row of a folder that `Dataset.save_to_disk` wrote."""

    folder: str
    row: int

    def encoded(self) -> Any:
        """As `TarMember.encoded`, or a path."""
        dataset, column = opened_dataset(self.folder)
        return _only(dataset.select_columns([column])[self.row][column])


Place = TarMember | ParquetRow | SavedRow


def _located(content: Any, folder: str) -> Any:
    path = content.get("path") if isinstance(content, dict) and content.get("bytes") is None else content
    if not isinstance(path, str) or SCHEMES.match(path) or "." not in path:  # the last may be a picture in base64
        return content
    return os.path.join(folder, os.path.expanduser(path))


def _only(content: Any) -> Any:
    if isinstance(content, list):
        if len(content) != 1:
            raise ValueError(f"it has {len(content)} pictures; one is asked about at a time.")
        content = content[0]
    if content is None:
        raise ValueError("it has no picture.")
    return content


def tar_members(file: str, wanted: Callable[[str], bool]) -> Iterator[TarMember]:
    """The files in a tar file whose names are wanted, in its order; only their headers are read.

    Raises:
        ValueError: for what is no tar file, one that is damaged or cut off, several of them in one file, or a packed
            one, in which nothing can be found without unpacking all.
    """
    seen: dict[str, TarMember] = {}  # what links may stand for
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                archive.members = []  # it would remember all of them
                if not wanted(posixpath.basename(member.name)):
                    continue
                if member.islnk() or member.issym():
                    yield replace(_linked(member, seen, file), name=member.name)
                elif member.isfile() and not member.issparse():
                    seen[member.name] = TarMember(file, member.name, member.offset_data, member.size)
                    yield seen[member.name]
            _check_end(file, archive.offset)
    except FileNotFoundError:
        raise ValueError(f"There is no file {file}; check the path.") from None
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{file} cannot be read as a tar file ({error}); shards must not be compressed.") from None


def _linked(member: tarfile.TarInfo, seen: dict[str, TarMember], file: str) -> TarMember:
    """The file that a link in a tar file stands for."""
    folder = posixpath.dirname(member.name) if member.issym() else ""
    found = seen.get(posixpath.normpath(posixpath.join(folder, member.linkname)), seen.get(member.linkname))
    if found is None:
        raise ValueError(
            f"{file}: {member.name} is a link to {member.linkname}, which is not in front of it there; write the shard "
            "with files in the place of links (tar --dereference --hard-dereference)."
        )
    return found


def _check_end(file: str, offset: int) -> None:
    """ValueError unless a tar file ends where its last member does. `tarfile` stops at the first block that is no
    header, whatever comes behind."""
    with open(file, "rb") as content:
        content.seek(offset)
        mark = content.read(tarfile.BLOCKSIZE)
        if len(mark) < tarfile.BLOCKSIZE:
            raise ValueError(
                f"{file} is cut off at byte {offset + len(mark):,}: a tar file ends with a mark of its own."
            )
        if mark.count(0) < len(mark):
            raise ValueError(f"{file} is damaged at byte {offset:,}: no file begins there, nor do they end.")
        while block := content.read(1 << 20):
            if block.count(0) < len(block):
                raise ValueError(
                    f"{file} goes on behind its end at byte {offset:,}, as tar files do that were written one behind "
                    "the other into one; name each of them."
                )


def parquet_rows(file: str) -> Iterator[tuple[ParquetRow, dict[str, Any]]]:
    """Every row of a parquet file, with what its plain columns say.

    Raises:
        ValueError: for what is no parquet file, or one without a column of pictures.
    """
    table, column = _opened_parquet(file)
    plain = [name for name in _plain_columns(table.schema_arrow) if name != column]
    for group in range(table.num_row_groups):
        count, place = table.metadata.row_group(group).num_rows, 0
        if not plain:
            yield from ((ParquetRow(file, group, number), {}) for number in range(count))
            continue
        for batch in table.iter_batches(_ROWS, row_groups=[group], columns=plain):
            for values in batch.to_pylist():
                yield ParquetRow(file, group, place), values
                place += 1


def _plain_columns(schema: "pa.Schema") -> list[str]:
    """The columns that are carried along: texts, numbers, and lists of them."""
    return [field.name for field in schema if _is_plain(field.type)]


def _is_plain(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(kind.value_type)
    asked = (types.is_string, types.is_large_string, types.is_boolean, types.is_integer, types.is_floating)
    return any(is_one(kind) for is_one in asked)


@lru_cache(maxsize=8)
def _opened_parquet(file: str) -> "tuple[pq.ParquetFile, str]":
    """A parquet file, and its column of pictures."""
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise missing(error, "Reading parquet files") from error
    if not os.path.isfile(file):
        raise ValueError(f"There is no file {file}; check the path.")
    try:
        table = pq.ParquetFile(file)
    except Exception as error:  # pyarrow's own kinds
        raise ValueError(f"{file} cannot be read as parquet: {error}") from None
    names = table.schema_arrow.names
    found = [name for name in _NAMED if name in names]
    if not found:
        raise ValueError(f"{file} has the columns {', '.join(names)}; one must be called `image`.")
    return table, found[0]


class _Groups:
    """The row groups that were used last. Rows are asked for in any order within windows, by several threads.

    Held are two groups at least, and more up to the rows of two windows, as long as all take no more than `most` bytes.
    """

    def __init__(self, most: int = _MOST_BYTES):
        self.most = most
        self._held: OrderedDict[tuple[str, int], Any] = OrderedDict()  # the one that was used last is at the end
        self._lock = threading.Lock()

    def pictures(self, file: str, group: int) -> Any:
        """A group's pictures, encoded, as an Arrow column."""
        key = file, group
        with self._lock:  # also while it is read: threads miss a group together
            if key not in self._held:
                self._held[key] = self._read(file, group)
                self._let_go()
            self._held.move_to_end(key)
            return self._held[key]

    @staticmethod
    def _read(file: str, group: int) -> Any:
        table, column = _opened_parquet(file)
        fresh = type(table)(file)  # one that is shared between threads is not safe to read from
        return fresh.read_row_group(group, columns=[column]).column(0)

    def _let_go(self) -> None:
        rows, size = (sum(sizes) for sizes in zip(*((len(c), c.nbytes) for c in self._held.values()), strict=True))
        while len(self._held) > 2:
            oldest = next(iter(self._held.values()))
            if size <= self.most and rows - len(oldest) < 2 * WINDOW:
                return
            rows, size = rows - len(oldest), size - oldest.nbytes
            self._held.popitem(last=False)


_groups = _Groups()


def saved_rows(folder: str) -> Iterator[tuple[SavedRow, dict[str, Any]]]:
    """Every row of a saved data set, with what its plain columns say.

    Raises:
        ValueError: for a folder that cannot be read, or has no column of pictures.
    """
    dataset, column = opened_dataset(os.path.abspath(folder))
    plain = [name for name in _plain_columns(dataset.data.schema) if name != column]
    rows = dataset.select_columns(plain)
    for row in range(len(dataset)):
        yield SavedRow(os.path.abspath(folder), row), rows[row] if plain else {}


@lru_cache(maxsize=8)
def opened_dataset(folder: str) -> "tuple[Dataset, str]":
    """A saved data set whose pictures stay encoded, and the column that holds them; errors as `saved_rows`."""
    datasets = import_datasets()
    try:
        dataset = datasets.load_from_disk(folder).with_format(None)  # it may have been saved as tensors
    except Exception as error:  # pyarrow's and others' own kinds
        raise ValueError(f"{folder} is a data set that cannot be read: {error}") from None
    named = [name for name in _NAMED if name in dataset.features]
    typed = [name for name, feature in dataset.features.items() if _is_of_pictures(feature)]
    if not named + typed:
        raise ValueError(f"{folder} has the columns {', '.join(dataset.features)}; one must be called `image`.")
    column = (named + typed)[0]
    encoded = without_decoding(dataset.features[column])
    return (dataset if encoded == dataset.features[column] else dataset.cast_column(column, encoded)), column


def _is_of_pictures(feature: Any) -> bool:
    """Whether a column holds pictures, or lists of them."""
    datasets = import_datasets()
    return isinstance(feature.feature if isinstance(feature, datasets.List) else feature, datasets.Image)
