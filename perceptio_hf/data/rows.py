"""Samples as rows of `datasets`: one set of columns for every task, so that tasks can be mixed.

Pictures and depth stay encoded (a path, or the bytes of a file) until the collator reads them: an unreadable one is
then an error of its sample, not of the data set.
"""

import functools
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType, NoneType
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from perceptio_hf.extras import missing
from perceptio_hf.processing.pictures import load_picture

from .depth_maps import grey_values
from .encoded import as_code_lists, as_list, local
from .form import CONVERSATIONS, SAMPLE_KEYS, as_sample, check_message, meant_by, name_of, picture_of, read_part
from .masks import as_polygons, mask_of_picture, mask_of_values, plane_of
from .run_length import compress_counts, encode_mask

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features, IterableDataset

_ENCODED_COLUMNS = ("images", "image", "depth", "depth_valid", "masks")  # `image` is LLaVA's
_FILES = ("images", "masks", "depth", "depth_valid")  # columns of files, given by path or as bytes
_BATCH, _BATCH_BYTES = 1000, 1 << 26
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


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
    polygons = datasets.List(datasets.List(datasets.Value("float64")))
    mask = {"size": datasets.List(datasets.Value("int32")), "counts": text, "polygons": polygons, **file}
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
        whole = as_sample(sample)
        messages = [_message(message) for message in whole["messages"]]
        return {
            "images": [_file(image) for image in _pictures_of(whole)],
            "messages": messages,
            "masks": [_mask(mask) for mask in as_list(whole.get("masks"))],
            "depth": [_depth_file(depth) for depth in as_list(whole.get("depth"))],
            "depth_unit": whole.get("depth_unit"),
            "depth_valid": [_mask(mask) for mask in as_list(whole.get("depth_valid"))],
            "depth_codes": [_whole(codes) for codes in as_code_lists(whole.get("depth_codes"))],
            "mask_pictures": _whole(as_list(whole.get("mask_pictures"))) or None,
            "depth_pictures": _whole(as_list(whole.get("depth_pictures"))) or None,
            "task": whole.get("task"),
            "id": None if whole.get("id") is None else str(whole["id"]),
        }
    except (ValueError, KeyError, TypeError, AttributeError, OSError, OverflowError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"Sample {name_of(sample)} does not have the form of a sample ({reason}); see perceptio_hf.data.samples."
        ) from None


def dataset_of(samples: Iterable[Mapping[str, Any]]) -> "Dataset":
    """A map-style data set of samples, in memory, as compact as it would be on disk."""
    return dataset_of_batches(as_batches(to_row(sample) for sample in samples))


def dataset_of_batches(batches: "Iterable[pa.RecordBatch]") -> "Dataset":
    """Batches of `as_batches` as a data set in memory."""
    datasets = import_datasets()
    import pyarrow as pa

    return datasets.Dataset(pa.Table.from_batches(batches, schema=sample_features().arrow_schema))


def as_batches(rows: Iterable[dict[str, Any]]) -> "Iterator[pa.RecordBatch]":
    """Rows in Arrow's form, in batches, so that only few at a time are Python objects.

    Raises:
        ValueError: naming a row that does not fit the columns.
    """
    batch: list[dict[str, Any]] = []
    weight = 0
    for row in rows:
        batch.append(row)
        weight += sum(len(file["bytes"] or b"") for column in _FILES for file in row[column])
        if len(batch) >= _BATCH or weight >= _BATCH_BYTES:
            yield _batch(batch)
            batch, weight = [], 0
    if batch:
        yield _batch(batch)


def _batch(rows: list[dict[str, Any]]) -> "pa.RecordBatch":
    import pyarrow as pa

    try:
        return pa.RecordBatch.from_pylist(rows, schema=sample_features().arrow_schema)
    except (ValueError, TypeError, OverflowError) as error:  # a code of 1.5, half a character of two, 2 ** 40
        if len(rows) == 1:
            raise ValueError(
                f"Sample {name_of(rows[0])} does not have the form of a sample ({error}); see "
                "perceptio_hf.data.samples."
            ) from None
    for row in rows:
        _batch([row])
    raise AssertionError("rows that fit one by one fit together")


def as_rows(dataset: "Dataset | IterableDataset", name: str = "the data set") -> "Dataset | IterableDataset":
    """Any data set with the columns of a sample -> one with exactly the columns of `sample_features`.

    Pictures that the data set embeds are neither decoded nor copied. Columns in LLaVA's form are turned into ours, and
    only beside them are columns that no sample has left out.

    Args:
        name: for messages.

    Raises:
        ValueError: for a data set that is empty, lacks `messages` or has columns that no sample has, naming them; or
            one with a transform, where columns have to be made.
    """
    columns = dataset.column_names
    if columns is not None and dataset.features == sample_features():
        _check_not_empty(dataset, name)
        return dataset
    check_no_transform(dataset, name)
    dataset = undecoded(dataset)
    first = _check_not_empty(dataset, name)
    _check_columns(list(columns or first), name)
    map_style = hasattr(dataset, "select")
    images = sample_features()["images"]
    if map_style and dataset.features.get("images") == images:
        rest = _mapped(dataset.remove_columns("images"), {"images"})
        joined = import_datasets().concatenate_datasets([dataset.select_columns("images"), rest], axis=1)
        return joined.select_columns(list(sample_features()))
    return _mapped(dataset, set())


def check_no_transform(dataset: "Dataset | IterableDataset", name: str) -> None:
    """Raise ValueError where a transform, drawn anew whenever a row is read, would be lost or drawn once for ever."""
    if (getattr(dataset, "format", None) or {}).get("type") == "custom":
        raise ValueError(
            f"{name} has a transform (set_transform), which is lost where data sets are put together or columns made: "
            "apply it by map, or give a stream (to_iterable_dataset, then map), which draws it anew in every epoch."
        )


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
    unknown = {column: meant_by(column) for column in columns if column not in SAMPLE_KEYS}
    if CONVERSATIONS in columns and "messages" not in columns:  # LLaVA's form, looked at row by row
        return
    if "messages" in columns and not unknown:
        return
    wrong = {column: right for column, right in unknown.items() if right and right not in columns}
    others = [column for column in unknown if column not in wrong]
    hints = [f"rename_column({column!r}, {right!r})" for column, right in wrong.items()]
    hints += [f"remove_columns({others!r})"] if others and "messages" in (*columns, *wrong.values()) else []
    raise ValueError(
        f"{name} has the columns {', '.join(columns)}; a sample needs `messages` and may have "
        f"{', '.join(key for key in SAMPLE_KEYS if key != 'messages')}. {'; '.join(hints) or 'Rename or add columns'}."
    )


def undecoded(dataset: "Dataset | IterableDataset") -> "Dataset | IterableDataset":
    """The same data set, giving files instead of decoded pictures."""
    features = dataset.features or {}
    for column in _ENCODED_COLUMNS:
        if column in features and (feature := without_decoding(features[column])) != features[column]:
            dataset = dataset.cast_column(column, feature)
    return dataset


def without_decoding(feature: Any) -> Any:
    """The type of a column that gives files instead of decoded pictures, also where it holds lists of them."""
    datasets = import_datasets()
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    return datasets.List(without_decoding(feature.feature)) if isinstance(feature, datasets.List) else feature


def _message(message: Any) -> dict[str, Any]:
    role, content = check_message(message)
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else [read_part(part) for part in content]
    return {"role": role, "content": [{"type": part["type"], "text": part.get("text")} for part in parts]}


def _pictures_of(sample: Mapping[str, Any]) -> list:
    """The pictures of a sample, given in `images` or in the parts of its messages."""
    given = as_list(sample.get("images"))
    contents = [message["content"] for message in sample["messages"]]
    named = [picture_of(part) for content in contents if not isinstance(content, str) for part in content]
    named = [picture for picture in named if picture is not None]
    if given and named:
        raise ValueError("it names pictures both in `images` and in `messages`; keep them in `images`.")
    return given or named


def _file(source: Any) -> dict[str, Any]:
    """A picture as {"bytes", "path"}."""
    source = local(source)
    if isinstance(source, Mapping):
        data, path = source.get("bytes"), source.get("path")
        if not isinstance(data, (bytes, NoneType)) or not isinstance(path, (str, NoneType)):
            raise ValueError(f"a file is {{'bytes': ...}} or {{'path': ...}}, not {str(source)[:60]}.")
        return {"bytes": data, "path": path}
    if isinstance(source, bytes):
        return {"bytes": source, "path": None}
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        return {"bytes": None, "path": path if "://" in path else os.path.abspath(os.path.expanduser(path))}
    picture = source if isinstance(source, Image.Image) else load_picture(source)
    if picture.mode not in _PNG_MODES:
        picture = load_picture(picture)  # scales what has more than 8 bits, where `convert` would cut it off
    file = io.BytesIO()
    picture.save(file, format="PNG", exif=picture.getexif())
    return {"bytes": file.getvalue(), "path": None}


def _whole(numbers: Iterable[Any]) -> list[int]:
    """Numbers as `int`; pyarrow would cut 1.5 to 1."""
    wrong = [number for number in numbers if int(number) != number]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is no whole number")
    return [int(number) for number in numbers]


def _depth_file(source: Any) -> dict[str, Any]:
    """A depth map as {"bytes", "path"}; arrays and pictures in memory are encoded as .npy."""
    if isinstance(source, (Mapping, bytes, str, os.PathLike)):
        return _file(source)
    file = io.BytesIO()
    values = grey_values(source) if isinstance(source, Image.Image) else np.asarray(source)
    np.save(file, values, allow_pickle=False)
    return {"bytes": file.getvalue(), "path": None}


def _mask(source: Any) -> dict[str, Any]:
    """A mask as run lengths with compressed counts, as polygons, or as a file."""
    empty = dict.fromkeys(("size", "counts", "polygons", "bytes", "path"))
    if isinstance(source, Mapping) and source.get("counts") is not None:
        counts = source["counts"]
        if isinstance(counts, (list, tuple, np.ndarray)):
            counts = compress_counts(_whole(counts))
        counts = counts if isinstance(counts, str) else counts.decode("ascii")
        return empty | {"size": _whole(source["size"]), "counts": counts}
    if isinstance(source, Mapping) and source.get("polygons") is not None:
        size = source.get("size")  # that they were drawn at, where it is said: checked against the picture's
        if size is not None:
            return empty | {"size": _whole(size), "polygons": as_polygons(source["polygons"])}
        source = source["polygons"]
    if isinstance(source, (list, tuple)):
        plane = plane_of(source)
        if plane is None:  # polygons, or labels in the size of a picture that nobody has opened yet
            return empty | {"polygons": as_polygons(source)}
        source = plane
    if isinstance(source, np.ndarray):
        return empty | encode_mask(mask_of_values(source))
    if isinstance(source, Image.Image):
        return empty | encode_mask(mask_of_picture(source))
    return empty | _file(source)
