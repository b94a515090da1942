"""What `perceptio label` wrote, to learn from: depth spans of pictures, and questions behind them (docs/label.md)."""

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceptio_hf.data.formats.coco_annotations import read_json
from perceptio_hf.data.rows import as_batches, as_rows, dataset_of_batches, import_datasets, sample_features, to_row
from perceptio_hf.data.sources import DEPTH_ANSWER
from perceptio_hf.files import expanded, files_below
from perceptio_hf.tokens import DEPTH_END_TOKEN, DEPTH_START_TOKEN
from perceptio_hf.world.questions import DEPTH_QUESTIONS

from .listing import with_pictures
from .referring import held_out_files, held_out_pictures

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT, VERSION = "perceptio labels", 1
METADATA_KEY = "perceptio_labels"  # of the schema of every shard of labels and of their questions
PARTS = ("spans", "questions")
_ABOUT, _QUESTIONS = "labels.json", "questions"
_COCO_NAME = re.compile(r"(\d{12})\.(?:jpe?g|png)\b", re.IGNORECASE)


def labels(
    folder: str | os.PathLike,
    *,
    part: str = "spans",
    maps: bool = False,
    held_out: str | os.PathLike | None = None,
    missing: str = "raise",
) -> "Dataset":
    """Samples out of a folder of labels.

    Args:
        folder: what `perceptio label --out` wrote, complete.
        part: "spans", the depth of each picture; "questions", spans first and then the answer; or one kind of
            questions, such as "closest".
        maps: of spans: learn from the teacher's maps, which the model's own codec encodes anew, instead of its codes.
            The reconstruction loss then compares with what the teacher saw, not with what the codec kept of it.
        held_out: a folder with records of RefCOCO's family: COCO's pictures that these test on, known by their names,
            are left out. Questions about objects teach their masks.
        missing: "raise", or "skip" to leave out pictures that are not there any more.

    Raises:
        ValueError: for a folder without labels or with half of them, without maps or questions that were asked for,
            where pictures or maps are missing, or where none is COCO's and some are to be held out.
    """
    place = expanded(folder)
    if maps and part != "spans":
        raise ValueError(
            f"{place}: maps: true goes with part: spans; the spans of {part!r} are the codes that were labelled. Leave "
            "maps out."
        )
    about = read_label_metadata(place)
    found = _spans(place, about, maps) if part == "spans" else _questions(place, part)
    return with_pictures(found if held_out is None else _without_tested(found, place, held_out), place, missing)


def _questions(place: Path, part: str) -> "Dataset":
    """All questions, or those of one kind."""
    if not (place / _QUESTIONS).is_dir():
        raise ValueError(
            f"{place} has no questions; label with --questions closest,order,objects, or take part: spans."
        )
    questions = as_rows(import_datasets().load_from_disk(str(place / _QUESTIONS)), f"{place / _QUESTIONS}")
    if part != "questions":
        kinds = questions.with_format(None)["task"]
        chosen = [number for number, kind in enumerate(kinds) if kind == part]
        if not chosen:
            known = ", ".join(("spans", "questions", *sorted(set(kinds))))
            raise ValueError(f"{place} has no part {part!r}; it has {known}.")
        questions = questions.select(chosen)
    return questions


def _without_tested(dataset: "Dataset", place: Path, held_out: str | os.PathLike) -> "Dataset":
    named = [_COCO_NAME.search(name or "") for name in dataset.with_format(None)["id"]]
    if not any(named):
        raise ValueError(
            f"{place}: held_out is about COCO's pictures, and no label is of one by its id (000000000009.jpg, "
            f"COCO_train2014_000000000009.jpg); they are such as {dataset[0]['id']}. Leave held_out out."
        )
    tested = held_out_pictures(held_out_files(held_out))
    kept = [row for row, name in enumerate(named) if name is None or int(name[1]) not in tested]
    if not kept:
        raise ValueError(f"{place} holds no picture that is not held out.")
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


def read_label_metadata(folder: str | os.PathLike) -> dict[str, Any]:
    """`labels.json`: teacher, codec, number of rows.

    Raises:
        ValueError: for a folder without labels, of a newer version, or whose labelling has not ended.
    """
    file = expanded(folder) / _ABOUT
    if not file.is_file():
        raise ValueError(f"{folder} holds no labels ({file.name} is missing); make them with `perceptio label`.")
    about = read_json(file)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{file} is no description of labels; take the folder that `perceptio label --out` wrote.")
    if about.get("version") != VERSION:
        raise ValueError(f"{file} is of version {about.get('version')!r}; this release reads {VERSION}. Update it.")
    if about.get("complete") is not True:
        raise ValueError(f"{folder} is not complete; give the same `perceptio label` command again, it goes on.")
    return about


def saved_label_codecs(place: Path) -> list[dict[str, Any]]:
    """The codecs of codes that `perceptio label` wrote, as the shards of a saved data set name them, wherever it was
    copied to; none for any other place."""
    import pyarrow as pa

    found = []
    for file in files_below(place) if place.is_dir() else ():
        if file.suffix != ".arrow":
            continue
        try:
            with pa.memory_map(str(file)) as shard:
                said = (pa.ipc.open_stream(shard).schema.metadata or {}).get(METADATA_KEY.encode())
        except (OSError, pa.ArrowInvalid):  # reading its rows will say what is wrong with it
            continue
        document = json.loads(said) if said else {}
        codec = document.get("labels", document).get("codec")
        if codec is not None and codec not in found:
            found.append(codec)
    return found


def _spans(place: Path, about: dict[str, Any], maps: bool) -> "Dataset":
    """The pictures stay where they are, files or bytes that are mapped into memory; only the rest is made."""
    import pyarrow as pa

    datasets = import_datasets()
    if maps and not about.get("maps"):
        raise ValueError(f"{place} has codes and no maps; label with --maps, or leave out maps: true.")
    table = datasets.load_from_disk(str(place / "labels"))
    if not len(table):
        raise ValueError(f"{place} holds no labelled picture.")
    seen = table.cast_column("image", datasets.Image(decode=False)).data.column("image")
    images = [pa.ListArray.from_arrays(pa.array(range(len(chunk) + 1), pa.int32()), chunk) for chunk in seen.chunks]
    rest = dataset_of_batches(as_batches(_rows(table, place, maps))).data.table
    schema = sample_features().arrow_schema
    whole = rest.set_column(
        schema.get_field_index("images"),
        schema.field("images"),
        pa.chunked_array([chunk.cast(schema.field("images").type) for chunk in images]),
    )
    return datasets.Dataset(whole)


def _rows(table: "Dataset", place: Path, maps: bool) -> Iterator[dict[str, Any]]:
    said = DEPTH_START_TOKEN + DEPTH_END_TOKEN + DEPTH_ANSWER
    columns = table.select_columns(["id", "codes", "depth"])
    for row, question in zip(columns, itertools.cycle(DEPTH_QUESTIONS), strict=False):
        depth = (
            {"depth": str(place / row["depth"]), "depth_unit": "relative"} if maps else {"depth_codes": row["codes"]}
        )
        yield to_row(
            {
                "id": row["id"],
                "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": said}],
                "task": "depth",
                **depth,
            }
        )


def check_codec(
    folder: str | os.PathLike, codec: Mapping[str, Any], fingerprint: str, num_tokens: int, num_codes: int
) -> None:
    """Whether the codes in a folder are those of a codec.

    Args:
        codec: whose they are, as labels.json says.
        fingerprint: of the codec, see `perceptio_hf.modeling.codec_identity`.
        num_tokens, num_codes: N and K of the codec.

    Raises:
        ValueError: where they are another's.
    """
    wrote = f"{codec.get('name')} ({codec.get('num_tokens')} codes of {codec.get('num_codes')})"
    if codec.get("fingerprint") != fingerprint:
        raise ValueError(
            f"The labels in {folder} are codes of the codec {wrote}, {codec.get('fingerprint')}; the model's own is "
            f"{fingerprint} ({num_tokens} codes of {num_codes}), which reads them as something else. Label with the "
            "model's codec, or, of part: spans, learn from the maps (maps: true) where there are some."
        )


def as_json(about: dict[str, Any]) -> str:
    """Teacher and codec of labels in one line."""
    return json.dumps({key: about[key] for key in ("teacher", "codec") if key in about}, ensure_ascii=False)
