"""Data sets of the `datasets` library, by their name on the Hub or from a folder."""

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from perceptio_hf.data.formats.hub_tables import split_name
from perceptio_hf.data.lines import names_files, with_places
from perceptio_hf.data.rows import as_rows, import_datasets, undecoded
from perceptio_hf.files import expanded

from .listing import check_missing, checked_pictures

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_SAVED = ("dataset_info.json", "dataset_dict.json")


def hub(
    name: str,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    columns: dict[str, str] | None = None,
    streaming: bool = False,
    missing: str = "raise",
) -> "Dataset | IterableDataset":
    """A data set with the columns of a sample (docs/data.md), or of LLaVA's form.

    Args:
        name: on the Hub, or a folder: with .parquet or .jsonl files, or one that `save_to_disk` wrote.
        split: which part.
        subset: its configuration, where it has several.
        revision: branch, tag or commit on the Hub.
        columns: ours -> theirs, where columns have other names; those that are not named are left out then.
        streaming: read while training, instead of downloading everything first; nothing is looked for before then.
        missing: "raise", or "skip" to leave out samples whose pictures are missing, or are not as many as they show.

    Raises:
        ValueError: where it cannot be had, lacks the split, its columns are none of a sample, or pictures are missing
            or not as many as their conversations show (counted, some named).
        ImportError: where `datasets` is not installed.
    """
    check_missing(missing, streaming)
    with _naming(name, split):
        dataset = _opened(name, split, subset, revision, streaming)
    if columns is not None:
        dataset = _renamed(dataset, columns, name)
    if (folder := expanded(name)).is_dir() and not _is_saved(folder):
        with _naming(name, split):
            dataset = _placed(dataset, folder)
    rows = as_rows(dataset, f"The data set {name} ({split})")
    return rows if streaming else checked_pictures(rows, Path(name), missing)


@contextmanager
def _naming(name: str, split: str) -> Iterator[None]:
    """Whatever the Hub, the network, pyarrow and `datasets` raise, as a ValueError that names the data set."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"The data set {name} (split {split!r}) cannot be had: {reason}") from error


def _is_saved(folder: Path) -> bool:
    return any((folder / file).is_file() for file in _SAVED)


def _opened(
    name: str, split: str, subset: str | None, revision: str | None, streaming: bool
) -> "Dataset | IterableDataset":
    datasets = import_datasets()
    folder = expanded(name)
    if not folder.is_dir():
        return datasets.load_dataset(name, subset, split=split, revision=revision, streaming=streaming)
    if revision is not None:
        raise ValueError(f"revision is {revision!r}, but the data set is a folder here, which has none; leave it out")
    if _is_saved(folder):
        if subset is not None:
            raise ValueError(f"subset is {subset!r}, but what `save_to_disk` wrote has none; leave it out")
        dataset = datasets.load_from_disk(str(folder))
        if isinstance(dataset, datasets.DatasetDict):
            dataset = dataset[split]
        elif dataset.split is not None and split_name(dataset) != split:
            raise ValueError(f"it is the split {split_name(dataset)!r}, saved by itself; ask for that one")
        return dataset.to_iterable_dataset() if streaming else dataset
    dataset = datasets.load_dataset(str(folder), subset, split=split, streaming=streaming)
    lines = _lines_among_pictures(dataset, folder, split)
    if lines:
        dataset = datasets.load_dataset("json", data_files={split: lines}, split=split, streaming=streaming)
    return dataset


def _lines_among_pictures(dataset: "Dataset | IterableDataset", folder: Path, split: str) -> list[str]:
    """Files of samples beside pictures so many that `datasets` takes the folder for one of pictures alone."""
    if dataset.column_names and dataset.column_names[0] != "image":
        return []
    lines = [path for path in sorted(folder.glob("*.jsonl")) if path.stem != "metadata"]
    return [str(path) for path in lines if split in path.stem] or ([str(path) for path in lines] * (split == "train"))


def _placed(dataset: "Dataset | IterableDataset", folder: Path) -> "Dataset | IterableDataset":
    """Files that rows name from the folder on, with the folder in front; `datasets` leaves them as they are."""
    dataset = undecoded(dataset)
    first = next(filter(names_files, dataset), None)  # conversations of words alone tell nothing
    if first is None or with_places(copy.deepcopy(first), folder) == first:
        return dataset
    return dataset.map(functools.partial(with_places, folder=folder), features=dataset.features)


def _renamed(
    dataset: "Dataset | IterableDataset", columns: Mapping[str, str], name: str
) -> "Dataset | IterableDataset":
    there = dataset.column_names or []
    lacking = [theirs for theirs in columns.values() if theirs not in there]
    if lacking:
        raise ValueError(f"The data set {name} has no column {lacking[0]!r}; it has {', '.join(there)}.")
    dataset = dataset.select_columns(list(dict.fromkeys(columns.values())))
    return dataset.rename_columns({theirs: ours for ours, theirs in columns.items() if ours != theirs})
