"""Writes a data set that `datasets.load_from_disk` opens: Arrow shards, never more than one batch in memory."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceptio_hf.data.published.labels import METADATA_KEY
from perceptio_hf.data.rows import import_datasets
from perceptio_hf.files import named, write_json

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

SHARD_ROWS, SHARD_BYTES = 20_000, 1 << 29
_BATCH_ROWS, _BATCH_BYTES = 1000, 1 << 26


def label_features() -> "Features":
    """The columns of labels (see docs/label.md)."""
    datasets = import_datasets()
    text, whole = datasets.Value("string"), datasets.Value("int32")
    return datasets.Features(
        {
            "id": text,
            "image": datasets.Image(),
            "width": whole,
            "height": whole,
            "codes": datasets.List(whole),
            "depth": text,
            "extra": text,
        }
    )


def write_dataset(
    folder: Path, rows: Iterable[Mapping[str, Any]], features: "Features", metadata: Mapping[str, Any]
) -> int:
    """Write rows as a saved data set, which replaces the one that is there when it is complete.

    Args:
        metadata: what stands in the schema of every shard, under `METADATA_KEY`.

    Returns:
        How many rows there were.

    Raises:
        OSError: where they cannot be written.
    """
    import pyarrow as pa

    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):  # of runs that were killed; nobody else writes here
        shutil.rmtree(left, ignore_errors=True)
    fresh.mkdir(parents=True)
    schema = features.arrow_schema
    schema = schema.with_metadata({**(schema.metadata or {}), METADATA_KEY.encode(): json.dumps(metadata).encode()})
    try:
        names, count = [], 0
        for number, batches in enumerate(_shards(_batches(rows, schema))):
            names.append(f"data-{number:05d}.arrow")
            path = fresh / names[-1]
            with named(path), pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
                    count += batch.num_rows
        _describe(fresh, names, features)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return count


def _batches(rows: Iterable[Mapping[str, Any]], schema: "pa.Schema") -> "Iterator[pa.RecordBatch]":
    """At least one, so that a data set without rows has its columns."""
    import pyarrow as pa

    batch, weight, given = [], 0, False
    for row in rows:
        batch.append(row)
        weight += _weight(row)
        if len(batch) >= _BATCH_ROWS or weight >= _BATCH_BYTES:
            yield pa.RecordBatch.from_pylist(batch, schema=schema)
            batch, weight, given = [], 0, True
    if batch or not given:
        yield pa.RecordBatch.from_pylist(batch, schema=schema)


def _weight(row: Mapping[str, Any]) -> int:
    """Bytes of its pictures."""
    pictures = row["images"] if "images" in row else [row["image"]]
    return sum(len(picture["bytes"] or b"") for picture in pictures)


def _shards(batches: "Iterator[pa.RecordBatch]") -> "Iterator[Iterator[pa.RecordBatch]]":
    """Batches, in parts of about a shard each; a part must be gone through before the next is asked for."""
    waiting = [next(batches)]

    def part() -> "Iterator[pa.RecordBatch]":
        rows = size = 0
        while waiting:
            batch = waiting.pop()
            rows, size = rows + batch.num_rows, size + batch.nbytes
            yield batch
            waiting.extend([following] if (following := next(batches, None)) is not None else [])
            if rows >= SHARD_ROWS or size >= SHARD_BYTES:
                return

    while waiting:
        yield part()


def _describe(folder: Path, names: list[str], features: "Features") -> None:
    """The two files that `load_from_disk` reads first."""
    datasets = import_datasets()
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": os.urandom(8).hex(),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_json(folder / "state.json", state)
