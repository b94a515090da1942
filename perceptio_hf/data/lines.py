"""JSON files of samples, one per line or in one array: read in parts by several processes, or once into Arrow."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceptio_hf import __version__
from perceptio_hf.files import expanded, replacing

from .form import CONVERSATIONS, PART_KEYS
from .rows import as_batches, dataset_of_batches, import_datasets, sample_features, to_row

if TYPE_CHECKING:
    from datasets import Dataset

Shard = tuple[str, str, int, int, int]  # file, folder of its pictures, first byte, the one after the last, line number
MOST_IN_MEMORY = 1 << 24  # bytes of a file that is not worth a copy on disk
_FILE_KEYS = ("images", "image", "masks", "depth", "depth_valid")
SCHEMES = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
_HEAD, _CHUNK, _MOST_ITEM = 1 << 12, 1 << 20, 1 << 28  # characters
_BETWEEN = re.compile(r"[\s,]*")
_STAMP = b"perceptio_hf"


def is_array(file: Path) -> bool:
    """Whether a file holds one JSON array, as LLaVA's do, instead of one sample per line."""
    with open(file, "rb") as data:
        return data.read(_HEAD).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def shards_of(file: Path, folder: Path, most: int) -> list[Shard]:
    """A file of lines in at most so many parts of about the same length."""
    step = -(-file.stat().st_size // most) or 1
    starts, place = [(0, 1)], 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if place >= step * len(starts):
                starts.append((place, number))
            place += len(line)
    ends = [start for start, _ in starts[1:]] + [place]
    return [(str(file), str(folder), start, end, number) for (start, number), end in zip(starts, ends, strict=True)]


def rows_of_shards(shards: Iterable[Shard]) -> Iterator[dict[str, Any]]:
    """The samples of parts of files, as rows.

    Raises:
        ValueError: naming a line that holds none.
    """
    for file, folder, start, end, first in shards:
        with open(file, "rb") as lines:
            lines.seek(start)
            for number, line in enumerate(iter(lines.readline, b""), first):
                if start >= end:
                    break
                start += len(line)
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    place = f"{file}, line {number}"
                    yield _row(_parsed(line, place), place, Path(folder))


def _parsed(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not text in UTF-8 ({error.reason}); save the file in UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error}); write one sample per line.") from None


def _rows_of_array(file: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """As `rows_of_shards`, of a file with one array; little of it is in memory at a time."""
    for number, item in enumerate(_items(file), 1):
        place = f"{file}, item {number}"
        yield _row(item, place, folder)


def _items(file: Path) -> Iterator[Any]:
    decoder, number = json.JSONDecoder(), 0
    try:
        with open(file, encoding="utf-8-sig") as text:
            read = text.read(max(_CHUNK, _HEAD))
            place = read.index("[") + 1
            while True:
                place = _BETWEEN.match(read, place).end()
                if read.startswith("]", place):
                    return
                try:
                    item, place = decoder.raw_decode(read, place)
                except (ValueError, RecursionError) as error:  # broken, or not all of it read yet
                    more = text.read(max(_CHUNK, len(read) - place)) if len(read) - place < _MOST_ITEM else ""
                    if not more:
                        reason = re.sub(r": line \d+ column.*", "", str(error))
                        raise ValueError(f"{file}, item {number + 1} is not JSON ({reason}).") from None
                    read, place = read[place:] + more, 0
                else:
                    number += 1
                    yield item
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8 ({error.reason}); save the file in UTF-8.") from None


def _row(sample: Any, place: str, folder: Path) -> dict[str, Any]:
    """A sample of a file as a row with absolute paths; its place in the file is its `id` unless it has one."""
    if not isinstance(sample, dict) or not any(
        isinstance(sample.get(key), list) for key in ("messages", CONVERSATIONS)
    ):
        keys = sorted(sample) if isinstance(sample, dict) else type(sample).__name__
        raise ValueError(f"{place} has {keys}; a sample is a JSON object with `messages` (and `images`, `masks`, ...).")
    try:
        return to_row({"id": place, **with_places(sample, folder)})
    except ValueError as error:
        raise ValueError(f"{place}: {error}" if sample.get("id") is not None else str(error)) from None


def with_places(sample: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A sample whose files are named from `folder`, with the folder in front of them; its messages are changed."""
    for key in _FILE_KEYS:
        if sample.get(key) is not None:
            sample = {**sample, key: _located(sample[key], folder)}
    for part in _parts(sample.get("messages")):
        part |= {key: _located(part[key], folder) for key in PART_KEYS if part.get(key) is not None and key != "base64"}
    return sample


def names_files(sample: Mapping[str, Any]) -> bool:
    """Whether a sample has a picture, mask or depth map anywhere."""
    parts = _parts(sample.get("messages"))
    return any(sample.get(key) for key in _FILE_KEYS) or any(part.get(key) for part in parts for key in PART_KEYS)


def _parts(messages: Any) -> Iterator[dict]:
    """The parts of messages, as far as these have the form of messages."""
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        yield from (part for part in content if isinstance(part, dict)) if isinstance(content, list) else ()


def _located(value: Any, folder: Path) -> Any:
    """File names in `value` (one, a list of them, or other things) with the folder in front."""
    if isinstance(value, str):
        return value if SCHEMES.match(value) else str(folder / expanded(value))
    if isinstance(value, Mapping) and isinstance(value.get("path"), str) and value.get("bytes") is None:
        return {**value, "path": _located(value["path"], folder)}
    if isinstance(value, Mapping) and isinstance(value.get("url"), str):  # of OpenAI's parts
        return {**value, "url": _located(value["url"], folder)}
    if isinstance(value, list) and any(isinstance(item, (str, Mapping)) for item in value):
        return [_located(item, folder) for item in value]
    return value


def table_of(files: list[tuple[Path, Path]]) -> "Dataset":
    """The samples of whole files, each with the folder of its pictures, as a data set that is in memory as little as
    can be.

    Raises:
        ValueError: as `rows_of_shards`.
        OSError: where the cache folder of `datasets` cannot be written.
    """
    parts = [
        dataset_of_batches(as_batches(_rows(file, folder)))
        if file.stat().st_size <= MOST_IN_MEMORY
        else _mapped(file.resolve(), folder.resolve())
        for file, folder in files
    ]
    return import_datasets().concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def _rows(file: Path, folder: Path) -> Iterator[dict[str, Any]]:
    if is_array(file):
        return _rows_of_array(file, folder)
    return rows_of_shards([(str(file), str(folder), 0, file.stat().st_size, 1)])


def _mapped(file: Path, folder: Path) -> "Dataset":
    """A file as Arrow on disk."""
    return mapped_once(file, str(folder), [file], lambda: _rows(file, folder))


def mapped_once(
    place: Path, options: str, files: Sequence[Path], rows: Callable[[], Iterable[dict[str, Any]]]
) -> "Dataset":
    """Rows as Arrow on disk, in the cache folder of `datasets`; one process makes it, others wait and map it too.

    Args:
        place: of the data, and its name in the progress bar.
        options: what else the rows depend on.
        files: when one of them has changed, the rows are made anew.
        rows: makes them.
    """
    datasets = import_datasets()
    from filelock import FileLock

    name = hashlib.sha256(f"{place}\n{options}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
    copy = Path(datasets.config.HF_DATASETS_CACHE, "perceptio_hf", f"{place.stem}-{name}.arrow")
    copy.parent.mkdir(parents=True, exist_ok=True)
    stamp = _stamp(files)
    with FileLock(f"{copy}.lock"):
        if _stamp_of(copy) != stamp:
            _write(rows(), place.name, stamp, copy)
        return datasets.Dataset.from_file(str(copy))


def _stamp(files: Sequence[Path]) -> bytes:
    """What the files looked like, and what has read them."""
    states = [file.stat() for file in files]
    seen = " ".join(f"{state.st_size} {state.st_mtime_ns}" for state in states)
    return f"{__version__} {seen} {sample_features().arrow_schema}".encode()


def _stamp_of(copy: Path) -> bytes | None:
    import pyarrow as pa

    try:
        with pa.memory_map(str(copy)) as data:
            return (pa.ipc.open_stream(data).schema.metadata or {}).get(_STAMP)
    except (OSError, pa.ArrowInvalid):  # none yet
        return None


def _write(rows: Iterable[dict[str, Any]], name: str, stamp: bytes, copy: Path) -> None:
    import pyarrow as pa
    from datasets.utils import tqdm

    schema = sample_features().arrow_schema
    schema = schema.with_metadata({**(schema.metadata or {}), _STAMP: stamp})
    with replacing(copy) as temporary, pa.ipc.new_stream(os.fspath(temporary), schema) as writer:
        for batch in tqdm(as_batches(rows), desc=f"reading {name}", unit="k samples"):
            writer.write_batch(batch)
