"""Where samples come from: folders of samples, folders of pictures with depth, data sets on disk; and writing a folder.

A folder of samples holds `samples.jsonl`, one sample per line (see `perceptio_hf.data.samples.Sample`), whose pictures,
masks and depth maps are files named relative to the folder.
"""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceptio_hf.files import new_folder, write_text
from perceptio_hf.tokens import DEPTH_END_TOKEN, DEPTH_START_TOKEN
from perceptio_hf.world.questions import DEPTH_QUESTIONS

from .depth_maps import UNITS
from .rows import as_rows, dataset_of, import_datasets, sample_features, to_row

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SAMPLES_FILE = "samples.jsonl"
DEPTH_ANSWER = "Here is the depth map."
_SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"\x93NUM": ".npy", b"GIF8": ".gif"}


def load_samples(source: str | os.PathLike, *, streaming: bool = False) -> "Dataset | IterableDataset":
    """The samples at a place on disk.

    Args:
        source: a folder with `samples.jsonl`, a .jsonl file, or what `Dataset.save_to_disk` wrote.
        streaming: read line by line while training instead of keeping everything but the pictures in memory.

    Raises:
        ValueError: for a place that holds no samples, a line that is none (named), or columns that are missing.
        ImportError: where `datasets` is not installed.
    """
    datasets = import_datasets()
    path = Path(source).expanduser()
    if (path / "dataset_info.json").is_file():
        dataset = as_rows(datasets.load_from_disk(str(path)), str(path))
        return dataset.to_iterable_dataset(num_shards=min(len(dataset), 64)) if streaming else dataset
    file = path / SAMPLES_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"{path} holds no samples: give a folder with {SAMPLES_FILE}, a .jsonl file, or a folder that "
            "Dataset.save_to_disk wrote."
        )
    if streaming:
        stream = datasets.IterableDataset.from_generator(
            _rows_of_files, features=sample_features(), gen_kwargs={"files": [str(file)]}
        )
        return as_rows(stream, str(file))
    rows = list(_rows_of_files([str(file)]))
    if not rows:
        raise ValueError(f"{file} is empty; write one sample per line.")
    return datasets.Dataset.from_list(rows, features=sample_features())


def depth_folder(
    folder: str | os.PathLike,
    *,
    unit: str,
    pictures: str = "*.color.jpg",
    depths: str = "*.depth.png",
    questions: Sequence[str] = DEPTH_QUESTIONS,
    answer: str = DEPTH_ANSWER,
) -> "Dataset":
    """Pictures with depth maps beside them, as samples of the depth task.

    Args:
        folder: where both are; sub-folders only where the patterns say so.
        unit: what the depth maps hold: "mm", "m", "disparity" or "relative"; 0 in the first two is a hole.
        pictures, depths: which files they are. What `*` stands for must be the same for a picture and its depth map.
        questions: asked in turn.
        answer: what follows the depth span.

    Returns:
        One sample per pair, in order of their names.

    Raises:
        ValueError: for an unknown unit, patterns without exactly one `*`, no pair, or a file without its partner.
    """
    if unit not in UNITS:
        raise ValueError(f"Unknown depth unit {unit!r}; say which one the files hold: {', '.join(UNITS)}.")
    pairs = paired_files(Path(folder).expanduser(), pictures, depths)
    said = DEPTH_START_TOKEN + DEPTH_END_TOKEN + answer
    return dataset_of(
        {
            "id": name,
            "images": [picture],
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": said}],
            "depth": depth,
            "depth_unit": unit,
            "task": "depth",
        }
        for (name, (picture, depth)), question in zip(pairs.items(), itertools.cycle(questions), strict=False)
    )


def paired_files(folder: Path, pictures: str, depths: str) -> dict[str, tuple[Path, Path]]:
    """The pictures of a folder with their depth maps, by the name that they share, in its order.

    Args:
        pictures, depths: patterns of the files; what `*` stands for is the shared name.

    Raises:
        ValueError: patterns without exactly one `*`, no pair, or a file without its partner.
    """
    seen, measured = _by_name(folder, pictures), _by_name(folder, depths)
    if not seen or set(seen) != set(measured):
        alone = sorted(set(seen) ^ set(measured))
        raise ValueError(
            f"{folder} has {len(seen)} pictures {pictures} and {len(measured)} depth maps {depths}; every picture "
            f"needs its depth map. Without partner: {', '.join(alone[:5]) or 'none'}."
        )
    return {name: (seen[name], measured[name]) for name in sorted(seen)}


def write_samples(folder: str | os.PathLike, samples: Iterable[Mapping[str, Any]]) -> Path:
    """Write samples as a folder that `load_samples` reads: `samples.jsonl`, and their files in `files/`.

    Files keep their bytes; pictures and arrays in memory become PNG and .npy. The folder appears when it is complete.

    Raises:
        ValueError: for a folder that exists, or a sample without the form of one.
    """
    folder = Path(folder).expanduser()
    if folder.exists():
        raise ValueError(f"{folder} exists already; choose a new folder, or remove it first.")
    with new_folder(folder) as fresh:
        (fresh / "files").mkdir()
        lines = [json.dumps(_line(to_row(sample), number, fresh)) for number, sample in enumerate(samples)]
        write_text(fresh / SAMPLES_FILE, "".join(line + "\n" for line in lines))
    return folder


def _rows_of_files(files: list[str]) -> Iterator[dict[str, Any]]:
    for file in files:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield to_row(_parsed(line, f"{file}, line {number}", Path(file).parent))


def _parsed(line: str, place: str, folder: Path) -> dict[str, Any]:
    """A line as a sample with absolute paths; its place in the file is its `id` unless it has one."""
    try:
        sample = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error}); write one sample per line.") from None
    if not isinstance(sample, dict) or not isinstance(sample.get("messages"), list):
        keys = sorted(sample) if isinstance(sample, dict) else type(sample).__name__
        raise ValueError(f"{place} has {keys}; a sample is a JSON object with `messages` (and `images`, `masks`, ...).")
    for key in ("images", "masks", "depth", "depth_valid"):
        if sample.get(key) is not None:
            sample[key] = _located(sample[key], folder)
    return {"id": place, **sample}


def _located(value: Any, folder: Path) -> Any:
    """File names in `value` (one, a list of them, or other things) with the folder in front."""
    if isinstance(value, str):
        return value if "://" in value else str(folder / Path(value).expanduser())
    if isinstance(value, list) and any(isinstance(item, str) for item in value):
        return [_located(item, folder) for item in value]
    return value


def _by_name(folder: Path, pattern: str) -> dict[str, Path]:
    """What `*` stands for in the names of the files that match -> the file."""
    if pattern.count("*") - pattern.count("**/") * 2 != 1:
        raise ValueError(f"{pattern!r} must hold one *, which stands for the name a picture shares with its depth map.")
    end = len(pattern.rpartition("*")[2])
    files = [file for file in folder.glob(pattern) if file.is_file()]
    start = len(Path(pattern).name.partition("*")[0])
    return {str(file.parent.relative_to(folder) / file.name[start : len(file.name) - end]): file for file in files}


def _line(row: dict[str, Any], number: int, folder: Path) -> dict[str, Any]:
    """A row as JSON, its files written into the folder."""
    line = {key: value for key, value in row.items() if value not in (None, [])}
    for key in ("images", "masks", "depth", "depth_valid"):
        if key in line:
            line[key] = [
                _run_lengths(item)
                if item.get("counts") is not None
                else _kept(item, f"{number:06d}-{key}-{index}", folder)
                for index, item in enumerate(line[key])
            ]
    return line


def _run_lengths(mask: dict[str, Any]) -> dict[str, Any]:
    return {"size": mask["size"], "counts": mask["counts"]}


def _kept(file: dict[str, Any], name: str, folder: Path) -> str:
    """Copy a file, or write its bytes; returns its name relative to the folder."""
    data = file["bytes"]
    if data is None:
        try:
            data = Path(file["path"]).read_bytes()
        except OSError as error:
            raise ValueError(f"{file['path']} cannot be read ({error.strerror}).") from None
    suffix = Path(file["path"]).suffix if file["path"] else _SUFFIXES.get(data[:4], _SUFFIXES.get(data[:3], ".bin"))
    relative = f"files/{name}{suffix}"
    (folder / relative).write_bytes(data)
    return relative
