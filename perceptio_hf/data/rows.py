"""Samples as rows of `datasets`: one set of columns for every task, so that tasks can be mixed.

Pictures and depth stay encoded (a path, or the bytes of a file) until the collator reads them: an unreadable one is
then an error of its sample, not of the data set.
"""

import functools
import io
import os
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from perceptio_hf.extras import missing
from perceptio_hf.processing.pictures import load_picture

from .encoded import as_code_lists, as_list
from .run_length import compress_counts, encode_mask
from .samples import name_of

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

_ENCODED_COLUMNS = ("images", "depth", "depth_valid", "masks")
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")
_LIKELY_MISTAKES = {"image": "images", "mask": "masks", "conversations": "messages", "conversation": "messages"}


def import_datasets() -> ModuleType:
    """The `datasets` library, which only training needs.

    Raises:
        ImportError: saying how to install it.
    """
    try:
        import datasets
    except ImportError as error:
        raise missing(error, "Reading training data") from error
    return datasets


@functools.cache
def sample_features() -> "Features":
    """The columns of a sample (see `perceptio_hf.data.samples.Sample`); every one but `messages` may be None."""
    datasets = import_datasets()
    text, file = datasets.Value("string"), {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    mask = {"size": datasets.List(datasets.Value("int32")), "counts": text, **file}
    return datasets.Features(
        {
            "images": datasets.List(datasets.Image(decode=False)),
            "messages": datasets.List({"role": text, "content": datasets.List({"type": text, "text": text})}),
            "masks": datasets.List(mask),
            "depth": datasets.List(file),
            "depth_unit": text,
            "depth_valid": datasets.List(mask),
            "depth_codes": datasets.List(datasets.List(datasets.Value("int32"))),
            "mask_pictures": datasets.List(datasets.Value("int32")),
            "depth_pictures": datasets.List(datasets.Value("int32")),
            "task": text,
            "id": text,
        }
    )


def to_row(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample in the form of `sample_features`. Files are named, not read; arrays and pictures are encoded.

    Raises:
        ValueError: naming a sample that has no such form.
    """
    try:
        return {
            "images": [_file(image) for image in as_list(sample.get("images")) or _pictures_in(sample["messages"])],
            "messages": [_message(message) for message in sample["messages"]],
            "masks": [_mask(mask) for mask in as_list(sample.get("masks"))],
            "depth": [_depth_file(depth) for depth in as_list(sample.get("depth"))],
            "depth_unit": sample.get("depth_unit"),
            "depth_valid": [_mask(mask) for mask in as_list(sample.get("depth_valid"))],
            "depth_codes": as_code_lists(sample.get("depth_codes")),
            "mask_pictures": sample.get("mask_pictures"),
            "depth_pictures": sample.get("depth_pictures"),
            "task": sample.get("task"),
            "id": None if sample.get("id") is None else str(sample["id"]),
        }
    except (KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(
            f"Sample {name_of(sample)} does not have the form of a sample ({type(error).__name__}: {error}); see "
            "perceptio_hf.data.samples."
        ) from None


def dataset_of(samples: Iterable[Mapping[str, Any]]) -> "Dataset":
    """A map-style data set of samples, in memory."""
    rows = [to_row(sample) for sample in samples]
    return import_datasets().Dataset.from_list(rows, features=sample_features())


def as_rows(dataset: "Dataset | IterableDataset", name: str = "the data set") -> "Dataset | IterableDataset":
    """Any data set with the columns of a sample -> one with exactly the columns of `sample_features`.

    Pictures that the data set embeds are neither decoded nor copied; other columns are left out.

    Args:
        name: for messages.

    Raises:
        ValueError: for a data set that is empty or lacks `messages`, saying which columns it has.
    """
    columns = dataset.column_names
    if columns is not None and dataset.features == sample_features():
        _check_not_empty(dataset, name)
        return dataset
    dataset = _undecoded(dataset)
    first = _check_not_empty(dataset, name)
    _check_columns(list(columns or first), name)
    map_style = hasattr(dataset, "select")
    images = sample_features()["images"]
    if map_style and dataset.features.get("images") == images:
        rest = _mapped(dataset.remove_columns("images"), {"images"})
        joined = import_datasets().concatenate_datasets([dataset.select_columns("images"), rest], axis=1)
        return joined.select_columns(list(sample_features()))
    return _mapped(dataset, set())


def _mapped(dataset: "Dataset | IterableDataset", without: set[str]) -> "Dataset | IterableDataset":
    features = import_datasets().Features({k: v for k, v in sample_features().items() if k not in without})
    columns = dataset.column_names or list(next(iter(dataset)))
    extra = [column for column in columns if column not in features]
    return dataset.map(functools.partial(_row_without, without), features=features, remove_columns=extra)


def _row_without(without: set[str], sample: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in to_row(sample).items() if key not in without}


def _check_not_empty(dataset: "Dataset | IterableDataset", name: str) -> Mapping[str, Any]:
    """The first row."""
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{name} is empty; there is nothing to learn from.")
    return first


def _check_columns(columns: list[str], name: str) -> None:
    wrong = {column: _LIKELY_MISTAKES[column] for column in columns if column in _LIKELY_MISTAKES}
    wrong = {column: right for column, right in wrong.items() if right not in columns}
    if "messages" in columns and not wrong:
        return
    hint = "; ".join(f"rename_column({column!r}, {right!r})" for column, right in wrong.items())
    raise ValueError(
        f"{name} has the columns {', '.join(columns)}; a sample needs `messages` and may have "
        f"{', '.join(key for key in sample_features() if key != 'messages')}. {hint or 'Rename or add columns'}."
    )


def _undecoded(dataset: "Dataset | IterableDataset") -> "Dataset | IterableDataset":
    """The same data set, giving files instead of decoded pictures."""
    features = dataset.features or {}
    for column in _ENCODED_COLUMNS:
        if column in features and (feature := _without_decoding(features[column])) != features[column]:
            dataset = dataset.cast_column(column, feature)
    return dataset


def _without_decoding(feature: Any) -> Any:
    datasets = import_datasets()
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    return datasets.List(_without_decoding(feature.feature)) if isinstance(feature, datasets.List) else feature


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {
        "role": message["role"],
        "content": [{"type": part["type"], "text": part.get("text")} for part in parts],
    }


def _pictures_in(messages: Iterable[Mapping[str, Any]]) -> list:
    """Pictures that the parts of messages hold themselves."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    named = [[part.get(key) for key in ("image", "path", "url")] for part in parts if part["type"] == "image"]
    return [source for sources in named for source in sources if source is not None]


def _file(source: Any) -> dict[str, Any]:
    """A picture as {"bytes", "path"}."""
    if isinstance(source, Mapping):
        return {"bytes": source.get("bytes"), "path": source.get("path")}
    if isinstance(source, bytes):
        return {"bytes": source, "path": None}
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        return {"bytes": None, "path": path if "://" in path else os.path.abspath(os.path.expanduser(path))}
    picture = source if isinstance(source, Image.Image) else load_picture(source)
    if picture.mode not in _PNG_MODES:
        picture = picture.convert("RGB")
    file = io.BytesIO()
    picture.save(file, format="PNG", exif=picture.getexif())
    return {"bytes": file.getvalue(), "path": None}


def _depth_file(source: Any) -> dict[str, Any]:
    """A depth map as {"bytes", "path"}; arrays are encoded as .npy."""
    if isinstance(source, (Mapping, bytes, str, os.PathLike, Image.Image)):
        return _file(source)
    file = io.BytesIO()
    np.save(file, np.asarray(source), allow_pickle=False)
    return {"bytes": file.getvalue(), "path": None}


def _mask(source: Any) -> dict[str, Any]:
    """A mask as run lengths with compressed counts, or as a file."""
    empty = {"size": None, "counts": None, "bytes": None, "path": None}
    if isinstance(source, Mapping) and source.get("counts") is not None:
        counts = source["counts"]
        if isinstance(counts, (list, tuple, np.ndarray)):
            counts = compress_counts([int(count) for count in counts])
        counts = counts if isinstance(counts, str) else counts.decode("ascii")
        return empty | {"size": [int(side) for side in source["size"]], "counts": counts}
    if isinstance(source, (list, np.ndarray)):
        return empty | encode_mask(np.asarray(source))
    return empty | _file(source)
