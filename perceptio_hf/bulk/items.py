"""Many pictures as items: a folder of them, a pattern, a list, lines of JSON, tar shards, parquet, a data set on disk.
Pictures stay closed."""

import glob
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from perceptio_hf.data.encoded import open_encoded
from perceptio_hf.data.lines import SCHEMES
from perceptio_hf.files import expanded, files_below
from perceptio_hf.processing.pictures import load_picture

from .archives import PARQUET_SUFFIX, TAR_SUFFIX, Place, TarMember, parquet_rows, saved_rows, tar_members

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")
LINES_SUFFIX, LIST_SUFFIX = ".jsonl", ".txt"
_MANY_SUFFIXES = (LINES_SUFFIX, LIST_SUFFIX, TAR_SUFFIX, PARQUET_SUFFIX)
_PICTURE_KEYS = ("picture", "image")
_WANTED = {
    LINES_SUFFIX: "write one JSON object with `picture` and `question` per line.",
    LIST_SUFFIX: "write the path or address of one picture per line.",
    TAR_SUFFIX: f"a shard holds pictures ({', '.join(PICTURE_SUFFIXES)}).",
}
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_HEAD = 1 << 17  # bytes of a picture in a shard that tell its size: JPEG's header with EXIF and a colour profile
_ORIENTATION = 0x0112  # EXIF tag; values above 4 exchange width and height


@dataclass(frozen=True, slots=True)
class Item:
    """One picture, and what is asked about it.

    Args:
        index: its place among all items, from 0.
        id: as the line says; else its path below the folder, the place of its line, or the row of its data set.
        picture: what to call it: a path or an address.
        source: where it is: an absolute path or an address; a place in a larger file; None where a line names none.
        question: "" where the item has none of its own.
        spatial: as in `model.generate`; None where the item does not say.
        extra: what else the line or row says, carried along.
        error: why it cannot be used, where that is known already.
    """

    index: int
    id: str
    picture: str | None
    source: str | Place | None
    question: str = ""
    spatial: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def open(self) -> Image.Image:
        """The picture, RGB and upright.

        Raises:
            ValueError: naming a picture that cannot be read.
        """
        if self.error is not None:
            raise ValueError(self.error)
        if isinstance(self.source, str):
            return load_picture(self.source)
        try:
            return load_picture(open_encoded(self.source.encoded()))
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.picture}: {error}") from None

    def encoded(self) -> dict[str, Any]:
        """The picture as `datasets.Image` keeps it: a file by its path, one out of a larger file by its bytes."""
        content = self.source if isinstance(self.source, str) else self.source.encoded()
        if isinstance(content, dict) and content.get("bytes") is not None:
            return content
        if isinstance(content, bytes):  # of a column of plain bytes
            return {"bytes": content, "path": None}
        return {"bytes": None, "path": _absolute(content["path"] if isinstance(content, dict) else content)}

    def size(self) -> tuple[int, int] | None:
        """(width, height) as seen, read from the header; None where that cannot be read, or not without the network."""
        if self.error is not None or (isinstance(self.source, str) and SCHEMES.match(self.source)):
            return None
        head = _size_of(self.source.read(_HEAD)) if isinstance(self.source, TarMember) else None
        if head is not None:
            return head
        try:
            content = self.encoded()
        except Exception:  # pyarrow's own kinds; opening the picture will say which
            return None
        return _size_of(content["path"] if content["bytes"] is None else content["bytes"])


def _size_of(source: str | bytes) -> tuple[int, int] | None:
    """(width, height) as seen of a picture, or of the beginning of one."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            turned = picture.getexif().get(_ORIENTATION, 1) > 4
            return (picture.height, picture.width) if turned else picture.size
    except Exception:  # Pillow's readers raise many kinds; reading the whole picture will say which
        return None


def is_collection(word: str) -> bool:
    """Whether `word` names many pictures: a folder, a list, a tar shard, parquet, or a pattern such as `photos/*.jpg`
    or `shards-{000..127}.tar`."""
    if os.path.isdir(word) or word.lower().endswith(_MANY_SUFFIXES):
        return True
    return not SCHEMES.match(word) and not os.path.exists(word) and (glob.has_magic(word) or bool(_RANGE.search(word)))


def list_items(words: Sequence[str]) -> list[Item]:
    """The items that collections, and pictures among them, stand for, in order; those of a folder by name.

    A line or row that cannot be used becomes an item with an `error`.

    Raises:
        ValueError: for a collection that does not exist, cannot be read, or holds nothing.
    """
    items: list[Item] = []
    for word in words:
        start = len(items)
        items += [Item(start + place, **fields) for place, fields in enumerate(_fields(word))]
        if len(items) == start:
            raise ValueError(f"{word} is empty; {_WANTED.get(os.path.splitext(word)[1].lower(), 'it needs pictures.')}")
    return items


def _fields(word: str) -> Iterable[dict[str, Any]]:
    if os.path.isdir(word):
        is_saved = os.path.isfile(os.path.join(word, "dataset_info.json"))
        return _of_dataset(word) if is_saved else _of_folder(word)
    is_pattern = is_collection(word) and not os.path.exists(word) and (glob.has_magic(word) or _RANGE.search(word))
    return _of_pattern(word) if is_pattern else _of_file(word)


def _of_file(word: str) -> Iterable[dict[str, Any]]:
    """One file: of many pictures, or a picture."""
    kind = os.path.splitext(word)[1].lower()
    if kind == LINES_SUFFIX:
        return _of_lines(expanded(word))
    if kind == LIST_SUFFIX:
        return _of_list(expanded(word))
    if kind == TAR_SUFFIX:
        return _of_tar(os.path.expanduser(word))
    return _of_parquet(os.path.expanduser(word)) if kind == PARQUET_SUFFIX else [_of_path(word, word)]


def _of_path(name: str, path: str) -> dict[str, Any]:
    """A picture by its path or address."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:  # a file's name may be any bytes, a line of results is UTF-8
        shown, name = (text.encode("utf-8", "backslashreplace").decode() for text in (path, name))
        why = f"{shown} is not UTF-8, so it cannot be written into a result; rename it."
        return {"id": name, "picture": shown, "source": None, "error": why}
    return {"id": name, "picture": path, "source": _absolute(path)}


def _absolute(path: str) -> str:
    """Workers elsewhere have other working folders."""
    return path if SCHEMES.match(path) else os.path.abspath(os.path.expanduser(path))


def _of_folder(folder: str) -> Iterable[dict[str, Any]]:
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        parts = ", ".join(sorted(name for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name))))
        raise ValueError(f"{folder} holds several data sets; name one of them: {parts}.")
    found = [str(path) for path in files_below(folder) if _is_picture_name(path.name)]
    if not found:
        shards = sorted(glob.glob(os.path.join(glob.escape(folder), "*")))
        shards = [path for path in shards if path.lower().endswith((TAR_SUFFIX, PARQUET_SUFFIX))]
        if not shards:
            raise ValueError(
                f"{folder} is a folder without pictures ({', '.join(PICTURE_SUFFIXES)}) or shards of them "
                f"({TAR_SUFFIX}, {PARQUET_SUFFIX}); name another one."
            )
        return [fields for path in shards for fields in _of_file(path)]
    return [_of_path(os.path.relpath(path, folder), path) for path in sorted(found)]


def _is_picture_name(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(PICTURE_SUFFIXES)


def _of_pattern(pattern: str) -> list[dict[str, Any]]:
    whole = [path for part in _ranged(os.path.expanduser(pattern)) for path in glob.glob(part, recursive=True)]
    found = sorted(path for path in whole if os.path.isfile(path))
    if not found:
        raise ValueError(f"No file matches {pattern}; check the pattern.")
    return [fields for path in found for fields in _of_file(path)]


def _ranged(pattern: str) -> Iterator[str]:
    """`{000..127}`, as names of shards are written, with every number in its place."""
    named = _RANGE.search(pattern)
    if named is None:
        yield pattern
        return
    before, after, digits = pattern[: named.start()], pattern[named.end() :], len(named[1])
    for number in range(int(named[1]), int(named[2]) + 1):
        yield from _ranged(f"{before}{number:0{digits}d}{after}")


def _of_list(file: Path) -> Iterator[dict[str, Any]]:
    """One path or address a line, relative ones as seen from the folder of the list."""
    if not file.is_file():
        raise ValueError(f"There is no file {file}; check the path.")
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for line in filter(None, (line.strip() for line in lines)):
            yield _of_path(line, line if SCHEMES.match(line) else str(file.parent / expanded(line)))


def _of_lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        raise ValueError(f"There is no file {file}; check the path.")
    usable, first_error = False, None
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip(b" \t\r\n\xef\xbb\xbf"):
                continue
            try:
                fields = _of_line(line, f"line {number}", file.parent)
                usable = True
            except ValueError as error:
                why = f"{file}, line {number}: {error}"
                first_error = first_error or why
                fields = {"id": f"line {number}", "picture": None, "source": None, "error": why}
            yield fields
    if first_error and not usable:
        raise ValueError(f"no line can be used; {first_error}")


def _of_line(line: bytes, place: str, folder: Path) -> dict[str, Any]:
    try:
        values = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode("utf-8")  # a result can hold it
    except UnicodeError as error:
        raise ValueError(f"it is not text in UTF-8 ({error.reason}).") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error}); write one object per line.") from None
    if not isinstance(values, dict):
        raise ValueError(f"it is a {type(values).__name__}; write an object with `picture` and `question`.")
    key = next((key for key in _PICTURE_KEYS if values.get(key) is not None), None)
    if key is None:
        raise ValueError(f"it has {', '.join(sorted(values)) or 'nothing'}, but no `picture`.")
    picture = values.pop(key)
    if not isinstance(picture, str) or not picture:
        raise ValueError(f"`{key}` is {picture!r:.60}; it must be the path or address of a picture.")
    located = picture if SCHEMES.match(picture) else str(folder / expanded(picture))
    return _of_path(place, located) | _own(values)


def _own(values: dict[str, Any]) -> dict[str, Any]:
    """What a line or row says beside its picture."""
    fields: dict[str, Any] = {}
    for key in ("question", "spatial"):
        value = values.pop(key, None)
        if value is not None:
            if not isinstance(value, str):
                raise ValueError(f"`{key}` is {value!r:.60}; it must be a text.")
            fields[key] = value
    identity = values.pop("id", None)
    if identity is not None:
        fields["id"] = str(identity)
    values.pop("error", None)  # of the list of failures that an earlier run wrote
    return fields | {"extra": values}


def _of_dataset(folder: str) -> Iterator[dict[str, Any]]:
    for place, values in saved_rows(folder):
        yield _of_row(f"row {place.row}", f"{folder}, row {place.row}", place, values)


def _of_parquet(file: str) -> Iterator[dict[str, Any]]:
    name = os.path.basename(file)
    for row, (place, values) in enumerate(parquet_rows(os.path.abspath(file))):
        yield _of_row(f"{name} row {row}", f"{file}, row {row}", place, values)


def _of_row(name: str, shown: str, place: Place, values: dict[str, Any]) -> dict[str, Any]:
    fields = {"id": name, "picture": shown, "source": place}
    try:
        return fields | _own({key: value for key, value in values.items() if _is_worth_keeping(value)})
    except ValueError as error:
        return fields | {"error": f"{shown}: {error}"}


def _of_tar(file: str) -> Iterator[dict[str, Any]]:
    """The pictures of a shard in WebDataset's form; what else a sample has there is not read."""
    name = os.path.basename(file)
    for place in tar_members(os.path.abspath(file)):
        if _is_picture_name(os.path.basename(place.name)):
            yield {"id": f"{name}/{place.name}", "picture": f"{file}, {place.name}", "source": place}


def _is_worth_keeping(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))
