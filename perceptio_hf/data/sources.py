"""Where samples come from: folders of samples, folders of pictures with depth, data sets on disk; and writing a folder.

A folder of samples holds `samples.jsonl`, one sample per line (see `perceptio_hf.data.samples.Sample`), whose pictures,
masks and depth maps are files named relative to the folder. Large sets may be cut into `samples-00000.jsonl` and so on.
"""

import glob
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceptio_hf.data.published.listing import check_missing, checked_pictures
from perceptio_hf.files import expanded, new_folder
from perceptio_hf.tokens import DEPTH_END_TOKEN, DEPTH_START_TOKEN
from perceptio_hf.world.questions import DEPTH_QUESTIONS

from .depth_maps import UNITS
from .lines import is_array, rows_of_shards, shards_of, table_of
from .rows import as_rows, dataset_of, import_datasets, sample_features, to_row

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SAMPLES_FILE = "samples.jsonl"
MOST_SHARDS = 64  # parts in which several processes and workers read a stream
DEPTH_ANSWER = "Here is the depth map."
_SUFFIXES = {
    b"\x89PNG": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"RIFF": ".webp",
    b"\x93NUM": ".npy",
    b"GIF8": ".gif",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}
_SUFFIXES |= {b"PK\3\4": ".npz"}


def load_samples(source: str | os.PathLike, *, streaming: bool = False) -> "Dataset | IterableDataset":
    """The samples at a place on disk, in our form or LLaVA's (see `perceptio_hf.data.form`).

    Args:
        source: a folder with `samples.jsonl` or its parts `samples-*.jsonl`, a .jsonl file, a .json file with an array
            of samples, or what `Dataset.save_to_disk` wrote.
        streaming: read line by line while training, by as many processes and workers as there are. Without it, files
            are turned into Arrow first: small ones in memory, those of more than 16 MB once, in the cache folder of
            `datasets`, from where they are mapped into memory.

    Raises:
        ValueError: for a place that holds no samples, a line that is none (named), or columns that are missing.
        ImportError: where `datasets` is not installed.
    """
    datasets = import_datasets()
    path = expanded(source)
    if (path / "dataset_info.json").is_file():
        dataset = as_rows(datasets.load_from_disk(str(path)), str(path))
        return _stream_of(dataset) if streaming else dataset
    return _loaded([(file, file.parent) for file in _files_of(path)], streaming)


def load_llava(
    file: str | os.PathLike,
    *,
    images: str | os.PathLike | None = None,
    streaming: bool = False,
    missing: str = "raise",
) -> "Dataset | IterableDataset":
    """Conversations in LLaVA's form, .json or .jsonl.

    Args:
        file: as the data set's authors publish it.
        images: the folder in which its pictures lie; default: that of the file.
        streaming: as in `load_samples`; nothing is looked for before then.
        missing: "raise", or "skip" to leave out samples whose pictures are missing, or are not as many as they show.

    Raises:
        ValueError: as `load_samples`; for a file or folder that does not exist, and for pictures that are missing or
            not as many as their conversations show (counted, some named).
    """
    check_missing(missing, streaming)
    file = expanded(file)
    folder = file.parent if images is None else expanded(images)
    if not file.is_file() or not folder.is_dir():
        raise ValueError(f"There is no {'file ' + str(file) if not file.is_file() else 'folder ' + str(folder)}.")
    dataset = _loaded([(file, folder)], streaming)
    return dataset if streaming else checked_pictures(dataset, file, missing)


def _loaded(files: list[tuple[Path, Path]], streaming: bool) -> "Dataset | IterableDataset":
    """The samples of files, each with the folder of its pictures."""
    if streaming and not any(is_array(file) for file, _ in files):
        most = max(1, MOST_SHARDS // len(files))
        shards = [shard for file, folder in files for shard in shards_of(file, folder, most)]
        stream = import_datasets().IterableDataset.from_generator(
            rows_of_shards, features=sample_features(), gen_kwargs={"shards": shards}
        )
        return as_rows(stream, str(files[0][0]))
    dataset = table_of(files)
    if not len(dataset):
        raise ValueError(f"{files[0][0]} is empty; write one sample per line.")
    return _stream_of(dataset) if streaming else dataset


def _stream_of(dataset: "Dataset") -> "IterableDataset":
    return dataset.to_iterable_dataset(num_shards=min(len(dataset), MOST_SHARDS))


def _files_of(path: Path) -> list[Path]:
    """The files with samples at a place: one, or the parts of one."""
    if path.is_file():
        return [path]
    whole, parts = path / SAMPLES_FILE, sorted(path.glob("samples-*.jsonl"))
    if whole.is_file() and parts:
        raise ValueError(f"{path} holds both {SAMPLES_FILE} and {parts[0].name}; keep the whole, or its parts.")
    if not whole.is_file() and not parts:
        raise ValueError(
            f"{path} holds no samples: give a folder with {SAMPLES_FILE} (or samples-*.jsonl), a .jsonl file, a .json "
            "file with an array, or a folder that Dataset.save_to_disk wrote."
        )
    return parts or [whole]


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
        unit: what the depth maps hold: "mm", "m", "m/256" (0 in these is a hole), "disparity" or "relative".
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
    pairs = paired_files(expanded(folder), pictures, depths)
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
        pictures, depths: patterns of the files; what `*` stands for is the shared name, with the folders that `**/`
            stands for. Folders that are spelled out may differ: `rgb/*.jpg` and `depth/*.png`.

    Raises:
        ValueError: patterns without exactly one `*` or with an absolute path, no pair, or a file without its partner.
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
    folder = expanded(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already; choose a new folder, or remove it first.")
    with new_folder(folder) as fresh:
        (fresh / "files").mkdir()
        with open(fresh / SAMPLES_FILE, "w", encoding="utf-8") as lines:
            for number, sample in enumerate(samples):
                lines.write(json.dumps(_line(to_row(sample), number, fresh)) + "\n")
    return folder


def _by_name(folder: Path, pattern: str) -> dict[str, Path]:
    """What `*` stands for in the names of the files that match -> the file."""
    if pattern.count("*") - pattern.count("**/") * 2 != 1:
        raise ValueError(f"{pattern!r} must hold one *, which stands for the name a picture shares with its depth map.")
    if Path(pattern).is_absolute():
        raise ValueError(f"{pattern!r} is an absolute path; a pattern names files as seen from {folder}.")
    *inside, name = Path(pattern).parts
    ahead, behind = _spelled(inside), _spelled(inside[::-1])  # folders that stand for themselves
    behind = 0 if ahead == len(inside) else behind
    end, start = len(name.rpartition("*")[2]), len(name.partition("*")[0])
    found = {}
    for file in folder.glob(pattern):
        if file.is_file():
            parts = file.parent.relative_to(folder).parts
            found[str(Path(*parts[ahead : len(parts) - behind], file.name[start : len(file.name) - end]))] = file
    return found


def _spelled(parts: Sequence[str]) -> int:
    """How many parts of a pattern there are before one that stands for others."""
    return len(list(itertools.takewhile(lambda part: not glob.has_magic(part), parts)))


def _line(row: dict[str, Any], number: int, folder: Path) -> dict[str, Any]:
    """A row as JSON, its files written into the folder."""
    line = {key: value for key, value in row.items() if value not in (None, [])}
    for key in ("images", "masks", "depth", "depth_valid"):
        if key in line:
            line[key] = [
                _numbers(item)
                if item.get("counts") is not None or item.get("polygons") is not None
                else _kept(item, f"{number:06d}-{key}-{index}", folder)
                for index, item in enumerate(line[key])
            ]
    return line


def _numbers(mask: dict[str, Any]) -> dict[str, Any]:
    """The run lengths or polygons of a mask."""
    return {key: mask[key] for key in ("size", "counts", "polygons") if mask[key] is not None}


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
