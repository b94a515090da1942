"""Many pictures as items: a folder of them, a pattern, a list, lines of JSON, tar shards, parquet, a data set on disk.
Pictures stay closed."""

import glob
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from perceptio_hf.data.lines import SCHEMES
from perceptio_hf.files import expanded, files_below

from .archives import PARQUET_SUFFIX, TAR_SUFFIX, Place, TarMember, parquet_rows, saved_rows, tar_members
from .item import Item, absolute

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
_FIRST_MAGIC = re.compile(r"[*?[{]")
_ABOUT_PICTURES = "metadata.parquet"
_NAMED = 3  # missing files that an error names


def is_collection(word: str) -> bool:
    """Whether `word` names many pictures: a folder, a list, a tar shard, parquet, or a pattern such as `photos/*.jpg`
    or `shards-{000..127}.tar`."""
    if os.path.isdir(word) or word.lower().endswith(_MANY_SUFFIXES):
        return True
    return not SCHEMES.match(word) and not os.path.exists(word) and (glob.has_magic(word) or bool(_RANGE.search(word)))


def list_items(words: Sequence[str], leave_out: str | os.PathLike | None = None) -> list[Item]:
    """The items that collections, and pictures among them, stand for, in order; those of a folder by name.

    A line or row that cannot be used becomes an item with an `error`.

    Args:
        leave_out: a folder that results are written to. What folders and patterns find there is no item, so that the
            same command finds the same pictures when it is given again; those that lie below it themselves find all.

    Raises:
        ValueError: for a collection that does not exist, cannot be read, or holds nothing.
    """
    out = None if leave_out is None else os.path.realpath(leave_out)
    items: list[Item] = []
    for word in words:
        start = len(items)
        items += [Item(start + place, **fields) for place, fields in enumerate(_fields(word, out))]
        if len(items) == start:
            raise ValueError(f"{word} is empty; {_WANTED.get(os.path.splitext(word)[1].lower(), 'it needs pictures.')}")
    return items


def _fields(word: str, out: str | None) -> Iterable[dict[str, Any]]:
    if os.path.isdir(word):
        is_saved = os.path.isfile(os.path.join(word, "dataset_info.json"))
        return _of_dataset(word) if is_saved else _of_folder(word, out)
    is_pattern = is_collection(word) and not os.path.exists(word) and (glob.has_magic(word) or _RANGE.search(word))
    return _of_pattern(word, out) if is_pattern else _of_file(word)


def _of_file(word: str) -> Iterable[dict[str, Any]]:
    """One file: of many pictures, or a picture."""
    kind, place = os.path.splitext(word)[1].lower(), os.path.expanduser(word)
    if kind in (LINES_SUFFIX, LIST_SUFFIX):
        return (_of_lines if kind == LINES_SUFFIX else _of_list)(Path(place))
    if kind in (TAR_SUFFIX, PARQUET_SUFFIX):
        return (_of_tar if kind == TAR_SUFFIX else _of_parquet)(place)
    if not SCHEMES.match(word) and not os.path.lexists(place):
        raise ValueError(f"There is no picture, folder or list {word}.")
    return [_of_path(word, word)]


def _of_path(name: str, path: str) -> dict[str, Any]:
    """A picture by its path or address."""
    return _fields_of(name, path, absolute(path))


def _fields_of(name: str, shown: str, source: str | Place) -> dict[str, Any]:
    """Fields of an item; with an error where its names are not UTF-8: a file's may be any bytes, results are text."""
    names = [name, shown, *([source] if isinstance(source, str) else [])]
    wrong = [text for text in names if _spelled(text) != text]
    if not wrong:
        return {"id": name, "picture": shown, "source": source}
    why = f"{_spelled(wrong[-1])} is not UTF-8, so it cannot be written into a result; rename it."
    return {"id": _spelled(name), "picture": _spelled(shown), "source": None, "error": why}


def _spelled(text: str) -> str:
    """Text in UTF-8: bytes of a file's name that are none as \\udcXX."""
    return text.encode("utf-8", "backslashreplace").decode()


def _of_folder(folder: str, out: str | None) -> Iterable[dict[str, Any]]:
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        parts = ", ".join(sorted(name for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name))))
        raise ValueError(f"{folder} holds several data sets; name one of them: {parts}.")
    files = [str(path) for path in files_below(folder)]
    pictures = [path for path in files if _is_picture_name(os.path.basename(path))]
    found = sorted(_outside(pictures, folder, out))
    shards = sorted(_outside([path for path in files if _is_shard_name(os.path.basename(path))], folder, out))
    if found and shards:
        pattern = os.path.join(folder, "**", f"*{os.path.splitext(shards[0])[1]}")
        raise ValueError(
            f"{folder} holds pictures ({len(found)}, such as {found[0]}) and shards of pictures ({len(shards)}, such "
            f"as {shards[0]}); name those that are meant by a pattern, such as '{pattern}'."
        )
    if not found and not shards:
        _check_not_results(pictures, folder, out)
        raise ValueError(
            f"{folder} is a folder without pictures ({', '.join(PICTURE_SUFFIXES)}) or shards of them "
            f"({TAR_SUFFIX}, {PARQUET_SUFFIX}); name another one."
        )
    if shards:
        return [fields for path in shards for fields in _of_file(path)]
    return [_of_path(os.path.relpath(path, folder), path) for path in found]


def _is_shard_name(name: str) -> bool:
    """`metadata.parquet` says something about the pictures beside it, as `datasets` has it."""
    return not name.startswith(".") and name.lower().endswith((TAR_SUFFIX, PARQUET_SUFFIX)) and name != _ABOUT_PICTURES


def _is_picture_name(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(PICTURE_SUFFIXES)


def _of_pattern(pattern: str, out: str | None) -> list[dict[str, Any]]:
    files, absent = [], []
    for part in _ranged(os.path.expanduser(pattern)):
        if os.path.isfile(part):  # of whatever name
            files.append(part)
        elif glob.has_magic(part):
            files += filter(os.path.isfile, glob.glob(part, recursive=True))
        else:
            absent.append(part)
    if not files:
        raise ValueError(f"No file matches {pattern}; check the pattern.")
    if absent:
        named = ", ".join(absent[:_NAMED]) + (", ..." if len(absent) > _NAMED else "")
        raise ValueError(
            f"Of the {len(files) + len(absent)} files that {pattern} names, {len(absent)} are not there: {named}; "
            "complete them, or name a smaller range."
        )
    found = _outside(sorted(files), os.path.dirname(_FIRST_MAGIC.split(os.path.expanduser(pattern))[0]), out)
    if not found:
        _check_not_results(files, pattern, out)
    return [fields for path in found for fields in _of_file(path)]


def _outside(paths: Sequence[str], searched: str, out: str | None) -> Sequence[str]:
    """The paths that do not lie in `out`, the real path of the folder of results, or below it.

    Args:
        searched: the folder in which they were found; where it was chosen below `out`, so were they.
    """
    chosen = Path(os.path.realpath(searched))
    if out is None or (chosen.is_relative_to(out) and chosen != Path(out)):
        return paths
    folders = {os.path.dirname(path) for path in paths}
    inside = {folder for folder in folders if Path(os.path.realpath(folder)).is_relative_to(out)}
    return [path for path in paths if os.path.dirname(path) not in inside]


def _check_not_results(left_out: Sequence[str], word: str, out: str | None) -> None:
    """Raises ValueError where all that was found lies in the folder of results."""
    if left_out:
        raise ValueError(
            f"All {len(left_out)} files that {word} stands for, such as {left_out[0]}, lie in {out}, which is for the "
            f"results; name another --out, or leave {word} out."
        )


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
                why = _spelled(f"{file}, line {number}: {error}")
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
    values.pop("error", None)  # of the list of failures that an earlier run wrote
    located = picture if SCHEMES.match(picture) else str(folder / expanded(picture))
    return _of_path(place, located) | _own(values)


def _own(values: dict[str, Any]) -> dict[str, Any]:
    """What a line or row says beside its picture."""
    fields = {key: values.pop(key) for key in ("question", "spatial", "id") if values.get(key) is not None}
    if "id" in fields:
        fields["id"] = str(fields["id"])
    return fields | {"extra": {key: value for key, value in values.items() if key not in ("question", "spatial", "id")}}


def _of_dataset(folder: str) -> Iterator[dict[str, Any]]:
    for place, values in saved_rows(folder):
        yield _of_row(f"row {place.row}", f"{folder}, row {place.row}", place, values)


def _of_parquet(file: str) -> Iterator[dict[str, Any]]:
    name = os.path.basename(file)
    for row, (place, values) in enumerate(parquet_rows(os.path.abspath(file))):
        yield _of_row(f"{name} row {row}", f"{file}, row {row}", place, values)


def _of_row(name: str, shown: str, place: Place, values: dict[str, Any]) -> dict[str, Any]:
    return _fields_of(name, shown, place) | _own({key: value for key, value in values.items() if _is_whole(value)})


def _of_tar(file: str) -> Iterator[dict[str, Any]]:
    """The pictures of a shard in WebDataset's form; what else a sample has there is not read: of `7.jpg` and
    `7.mask.png`, which are one sample, the latter is no picture of its own."""
    name = os.path.basename(file)
    for key, members in itertools.groupby(tar_members(os.path.abspath(file), _is_picture_name), _key_of):
        sample = list(members)
        itself = [place for place in sample if os.path.splitext(place.name)[0] == key]
        for place in itself or sample:
            yield _fields_of(f"{name}/{place.name}", f"{file}, {place.name}", place)


def _key_of(place: TarMember) -> str:
    """What the files of one sample have in common: the name up to the first dot."""
    folder, slash, name = place.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _is_whole(value: Any) -> bool:
    parts = value if isinstance(value, list) else [value]
    return not any(part is None or (isinstance(part, float) and not math.isfinite(part)) for part in parts)
