"""Many pictures as items: a folder of them, a pattern, lines of JSON, a data set on disk. Pictures stay closed."""

import glob
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from perceptio_hf.data.encoded import open_encoded
from perceptio_hf.data.lines import SCHEMES
from perceptio_hf.processing.pictures import load_picture

if TYPE_CHECKING:
    from datasets import Dataset

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")
LINES_SUFFIX = ".jsonl"
_PICTURE_KEYS = ("picture", "image")
_PLAIN = ("string", "large_string", "bool", "int32", "int64", "float32", "float64")  # columns that are carried along
_ORIENTATION = 0x0112  # EXIF tag; values above 4 exchange width and height


@dataclass(frozen=True, slots=True)
class Item:
    """One picture, and what is asked about it.

    Args:
        index: its place among all items, from 0.
        id: as the line says; else its path below the folder, the place of its line, or the row of its data set.
        picture: what to call it: a path or an address.
        source: where it is: an absolute path or an address; (folder, row) of a data set; None where a line names none.
        question: "" where the item has none of its own.
        spatial: as in `model.generate`; None where the item does not say.
        extra: what else the line or row says, carried along.
        error: why it cannot be used, where that is known already.
    """

    index: int
    id: str
    picture: str | None
    source: str | tuple[str, int] | None
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
            return load_picture(open_encoded(_encoded(*self.source)))
        except ValueError as error:
            raise ValueError(f"{self.picture}: {error}") from None

    def size(self) -> tuple[int, int] | None:
        """(width, height) as seen, read from the header; None where that cannot be read, or not without the network."""
        if self.error is not None or (isinstance(self.source, str) and SCHEMES.match(self.source)):
            return None
        try:
            content = self.source if isinstance(self.source, str) else _encoded(*self.source)
            if isinstance(content, dict):
                content = io.BytesIO(content["bytes"]) if content.get("bytes") is not None else content["path"]
            with Image.open(content) as picture:
                turned = picture.getexif().get(_ORIENTATION, 1) > 4
                return (picture.height, picture.width) if turned else picture.size
        except Exception:  # Pillow's readers raise many kinds; reading the whole picture will say which
            return None


def is_collection(word: str) -> bool:
    """Whether `word` names many pictures: a folder, a .jsonl file, or a pattern such as `photos/*.jpg`."""
    if os.path.isdir(word) or word.lower().endswith(LINES_SUFFIX):
        return True
    return not SCHEMES.match(word) and glob.has_magic(word) and not os.path.exists(word)


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
            raise ValueError(f"{word} is empty; write one JSON object with `picture` and `question` per line.")
    return items


def _fields(word: str) -> Iterable[dict[str, Any]]:
    if os.path.isdir(word):
        is_saved = os.path.isfile(os.path.join(word, "dataset_info.json"))
        return _of_dataset(word) if is_saved else _of_folder(word)
    if word.lower().endswith(LINES_SUFFIX):
        return _of_lines(Path(word).expanduser())
    return _of_pattern(word) if is_collection(word) else [_of_path(word, word)]


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


def _of_folder(folder: str) -> list[dict[str, Any]]:
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        parts = ", ".join(sorted(name for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name))))
        raise ValueError(f"{folder} holds several data sets; name one of them: {parts}.")
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(place, name) for name in files if _is_picture_name(name)]
    if not found:
        raise ValueError(f"{folder} is a folder without pictures ({', '.join(PICTURE_SUFFIXES)}); name another one.")
    return [_of_path(os.path.relpath(path, folder), path) for path in sorted(found)]


def _is_picture_name(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(PICTURE_SUFFIXES)


def _of_pattern(pattern: str) -> list[dict[str, Any]]:
    found = sorted(path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path))
    if not found:
        raise ValueError(f"No file matches {pattern}; check the pattern.")
    return [_of_path(path, path) for path in found]


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
    located = picture if SCHEMES.match(picture) else str(folder / Path(picture).expanduser())
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
    dataset, column = _opened(os.path.abspath(folder))
    plain = [name for name, feature in dataset.features.items() if getattr(feature, "dtype", None) in _PLAIN]
    rows = dataset.select_columns([name for name in plain if name != column])
    for row in range(len(dataset)):
        fields = {"id": f"row {row}", "picture": f"{folder}, row {row}", "source": (os.path.abspath(folder), row)}
        values = {key: value for key, value in (rows[row] if plain else {}).items() if _is_worth_keeping(value)}
        try:
            yield fields | _own(values)
        except ValueError as error:
            yield fields | {"error": f"{folder}, row {row}: {error}"}


def _is_worth_keeping(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


@lru_cache(maxsize=8)
def _opened(folder: str) -> "tuple[Dataset, str]":
    """A data set whose pictures stay encoded, and the column that holds them."""
    from perceptio_hf.data.rows import import_datasets

    datasets = import_datasets()
    try:
        dataset = datasets.load_from_disk(folder)
    except Exception as error:  # pyarrow's and others' own kinds
        raise ValueError(f"{folder} is a data set that cannot be read: {error}") from None
    named = [name for name in ("picture", "image", "images") if name in dataset.features]
    typed = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if not named + typed:
        raise ValueError(f"{folder} has the columns {', '.join(dataset.features)}; one must be called `image`.")
    column = (named + typed)[0]
    if isinstance(dataset.features[column], datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset, column


def _encoded(folder: str, row: int) -> Any:
    """A data set's picture as it is kept: {"bytes": ..., "path": ...}, or a path."""
    dataset, column = _opened(folder)
    content = dataset.select_columns([column])[row][column]
    if isinstance(content, list):
        if len(content) != 1:
            raise ValueError(f"it has {len(content)} pictures; one is asked about at a time.")
        content = content[0]
    if content is None:
        raise ValueError("it has no picture.")
    return content
