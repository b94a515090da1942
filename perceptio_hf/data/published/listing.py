"""What all sources of published data need: rows that are made once, and a look whether the pictures are there."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from perceptio_hf.data.form import PICTURE_TOKEN
from perceptio_hf.data.lines import MOST_IN_MEMORY, mapped_once
from perceptio_hf.data.rows import dataset_of, to_row

if TYPE_CHECKING:
    from datasets import Dataset

_logger = logging.getLogger(__name__)
ON_MISSING = ("raise", "skip")
_NAMED = 5  # missing files that a message names
_FILES = {"images": "pictures", "masks": "masks", "depth": "depth maps", "depth_valid": "maps of valid depth"}


def listed(
    place: Path,
    files: Sequence[Path],
    samples: Callable[[], Iterable[Mapping[str, Any]]],
    *,
    missing: str,
    options: object = "",
) -> "Dataset":
    """Samples as a data set whose pictures are there.

    Args:
        place: where the data lie, for messages.
        files: that the samples are made of. Where they are large the rows are made once, and mapped into memory until
            one of the files changes.
        samples: makes them.
        missing: "raise", or "skip" to leave out samples whose pictures are missing.
        options: what the samples depend on beside the files, such as the folder that stands in them.

    Raises:
        ValueError: where there are none, or pictures are missing (counted, some named).
    """
    check_missing(missing)
    if sum(file.stat().st_size for file in files) <= MOST_IN_MEMORY:
        dataset = dataset_of(samples())
    else:
        dataset = mapped_once(place.resolve(), str(options), files, lambda: map(to_row, samples()))
    if not len(dataset):
        raise ValueError(f"{place} holds nothing to learn from.")
    return with_pictures(dataset, place, missing)


def with_pictures(dataset: "Dataset", place: Path, missing: str = "raise") -> "Dataset":
    """The samples whose files exist: of pictures, masks and depth maps. Folders are listed, each once; no file is
    opened, and of what the data set holds itself no byte is read.

    Raises:
        ValueError: where some are missing, unless `missing` is "skip"; where all are.
    """
    check_missing(missing)
    known: dict[str, set[str]] = {}
    kinds = {kind: [place for place in _files(dataset, kind) if not _is_there(place[1], known)] for kind in _FILES}
    gone = [place for places in kinds.values() for place in places]
    if not gone:
        return dataset
    noun = " and ".join(_FILES[kind] for kind, places in kinds.items() if places)
    absent, names = {row for row, _ in gone}, list(dict.fromkeys(path for _, path in gone))
    what = f"{place}: {len(names)} {noun} are missing, of {len(absent)} of {len(dataset)} samples: "
    what += ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    if missing == "raise" or len(absent) == len(dataset):
        raise ValueError(f"{what}. Complete the {noun}, name their folder, or leave such samples out (missing: skip).")
    _logger.warning("%s. Left out.", what)
    return dataset.select([number for number in range(len(dataset)) if number not in absent])


def check_missing(missing: str, streaming: bool = False) -> None:
    """ValueError for another word, and for one that a stream, in which nothing is looked for, could not keep."""
    if missing not in ON_MISSING:
        raise ValueError(f"missing is {missing!r}; choose one of {', '.join(ON_MISSING)}.")
    if streaming and missing != "raise":
        raise ValueError(
            f"missing is {missing!r}, but nothing is looked for in a stream before it is read; leave one of the "
            "two out, or set on_error: skip for the training."
        )


def _files(dataset: "Dataset", column: str) -> Iterator[tuple[int, str]]:
    """(row, path) of every entry of a column that is a file."""
    from pyarrow import compute

    row = 0
    for batch in dataset.select_columns([column]).with_format("arrow").iter(10_000):
        for chunk in batch.column(column).chunks:
            entries = compute.list_flatten(chunk)
            data, paths = (compute.struct_field(entries, name) for name in ("bytes", "path"))
            is_file = compute.and_(data.is_null(), paths.is_valid())
            places, names = (part.filter(is_file).to_pylist() for part in (compute.list_parent_indices(chunk), paths))
            yield from ((row + place, name) for place, name in zip(places, names, strict=True))
            row += len(chunk)


def _is_there(path: str, known: dict[str, set[str]]) -> bool:
    """Whether a path is an address, or a file in its folder, which is listed once."""
    if "://" in path:
        return True
    folder, name = os.path.split(path)
    if folder not in known:
        try:
            with os.scandir(folder or ".") as entries:
                known[folder] = {entry.name for entry in entries if not entry.is_dir()}
        except OSError:
            known[folder] = set()
    return name in known[folder]


def checked_pictures(dataset: "Dataset", place: Path, missing: str = "raise") -> "Dataset":
    """As `with_pictures`, and every conversation shows as many pictures (`<image>`) as its sample has.

    Raises:
        ValueError: also naming the first samples that show another number, unless these are to be skipped.
    """
    dataset = with_pictures(dataset, place, missing)
    shown, given = _shown_and_given(dataset)
    is_wrong = (shown > 0) & (shown != given)  # where no place is named, pictures come first
    if not is_wrong.any():
        return dataset
    wrong = np.flatnonzero(is_wrong)
    first = [f"{dataset[int(row)]['id']} shows {shown[row]} and has {given[row]}" for row in wrong[:_NAMED]]
    what = f"{place}: {len(wrong)} of {len(dataset)} samples show another number of pictures ({PICTURE_TOKEN}) than "
    what += f"they have: {'; '.join(first)}" + ("; ..." if len(wrong) > _NAMED else "")
    if missing == "raise" or is_wrong.all():
        raise ValueError(f"{what}. Mend or remove them, or leave them out (missing: skip).")
    _logger.warning("%s. Left out.", what)
    return dataset.select(np.flatnonzero(~is_wrong))


def _shown_and_given(dataset: "Dataset") -> tuple[np.ndarray, np.ndarray]:
    """How many pictures each conversation shows, and how many each sample has, (n,) each; counted by Arrow."""
    from pyarrow import compute

    shown, given = [], []
    for batch in dataset.select_columns(["messages", "images"]).with_format("arrow").iter(10_000):
        messages = batch.column("messages").combine_chunks()
        contents = compute.struct_field(compute.list_flatten(messages), "content")
        parts = compute.list_flatten(contents)
        kinds, texts = (compute.struct_field(parts, name) for name in ("type", "text"))
        places = compute.fill_null(compute.count_substring(texts, PICTURE_TOKEN), 0).to_numpy()
        places = places + compute.equal(kinds, "image").to_numpy(zero_copy_only=False)
        rows = compute.list_parent_indices(messages).to_numpy()[compute.list_parent_indices(contents).to_numpy()]
        shown.append(np.bincount(rows, weights=places, minlength=len(messages)).astype(int))
        given.append(compute.fill_null(compute.list_value_length(batch.column("images")), 0).to_numpy())
    return np.concatenate(shown), np.concatenate(given)


def published_mask(segmentation: Any, size: Sequence[int]) -> dict[str, Any]:
    """COCO's polygons or run lengths with the size [height, width] of their picture; nothing is drawn yet.

    Raises:
        ValueError: for neither of them, or run lengths of another size.
    """
    if isinstance(segmentation, Mapping):
        if not isinstance(segmentation.get("counts"), (str, bytes, list)) or not segmentation["counts"]:
            raise ValueError(f"its run lengths have no counts: {dict(segmentation)!r:.60}.")
        own = segmentation.get("size")
        if not isinstance(own, (list, tuple)) or list(own) != list(size):
            raise ValueError(
                f"its run lengths are {segmentation.get('size')} and its picture {list(size)} (height, width); the "
                "annotations belong to another version of the pictures."
            )
        return dict(segmentation)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(f"its segmentation is neither polygons nor run lengths: {segmentation!r:.60}.")
    return {"size": list(size), "polygons": segmentation}
