"""RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO, as they are published, to learn from.

    FOLDER/refs(unc).p          pickled list of referring records (RefCOCOg: refs(umd).p); gRefCOCO: grefs(unc).json
    FOLDER/instances.json       COCO's annotations of their pictures
    FOLDER/train2014/           COCO's pictures

A sample is a picture with all expressions about it: it is opened once for all of them.
"""

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceptio_hf.data.formats.coco_annotations import PICTURES, Annotations, first_existing
from perceptio_hf.data.formats.referring_records import (
    FILES,
    GOOGLE,
    annotations_of,
    picture_places,
    read_records,
    record_places,
    records_of_split,
    sentences_of,
    wanted_objects,
)
from perceptio_hf.files import expanded, files_below

from .listing import listed, published_mask
from .wording import conversation, expression_turn, rng_of

if TYPE_CHECKING:
    from datasets import Dataset

_logger = logging.getLogger(__name__)
TURNS = 20  # of a conversation; about 25 tokens each


def referring(
    name: str,
    folder: str | os.PathLike,
    *,
    split: str = "train",
    pictures: str | os.PathLike | None = None,
    turns: int = TURNS,
    held_out: str | os.PathLike | None = None,
    missing: str = "raise",
) -> "Dataset":
    """RefCOCO's family: one conversation for each picture, one turn for each expression.

    An expression of gRefCOCO gives one [SEG] for each object that it means, and none where it means none.

    Args:
        name: "refcoco", "refcoco+", "refcocog" or "grefcoco".
        folder: with `refs(unc).p` (RefCOCOg: `refs(umd).p`, gRefCOCO: `grefs(unc).json`) and `instances.json`; or the
            file of the records.
        split: "train", or another of its splits.
        pictures: the folder of COCO's train2014 pictures, where they lie elsewhere.
        turns: expressions in a conversation at most; a picture with more has several.
        held_out: a folder with records of other sets of the family: pictures of their val and test splits are left out,
            since RefCOCO's train split holds some that RefCOCOg tests on.
        missing: "raise", or "skip" to leave out pictures that are not there.

    Raises:
        ValueError: for files that are missing or damaged, records that contradict the annotations (named), or pictures
            that are missing.
    """
    if turns < 1:
        raise ValueError(f"turns is {turns}; a conversation has at least one.")
    place = expanded(folder)
    refs = first_existing(record_places(place, name), FILES[name][0])
    seen_at = None if pictures is None else expanded(pictures)
    annotations_file = first_existing([refs.parent / "instances.json", place / "instances.json"], "instances.json")
    kept_back = [] if held_out is None else held_out_files(held_out)
    samples = functools.partial(_samples, name, refs, place, split, seen_at, turns, kept_back)
    folder = first_existing(picture_places(refs, place, seen_at), PICTURES)
    options = (name, split, turns, os.path.abspath(folder), *map(os.path.abspath, kept_back))
    return listed(place, [refs, annotations_file, *kept_back], samples, missing=missing, options=options)


refcoco, refcocop, refcocog, grefcoco = (
    functools.partial(referring, name) for name in ("refcoco", "refcoco+", "refcocog", "grefcoco")
)


def held_out_files(folder: str | os.PathLike) -> list[Path]:
    """The records of all sets of RefCOCO's family in this folder or below it.

    Google's division counts only where there is no other beside it, as in the published archives: it divides objects
    and not pictures, so that what it tests on lies in many pictures that the other learns from.

    Raises:
        ValueError: where there is none.
    """
    folder = expanded(folder)
    names = {name for files in FILES.values() for name in files}
    every = sorted(file for file in files_below(folder) if file.name in names)
    divided = {file.parent for file in every if file.name != GOOGLE}
    found = [file for file in every if file.name != GOOGLE or file.parent not in divided]
    if not found:
        raise ValueError(f"{folder} holds no records of RefCOCO's family, such as refs(unc).p, to hold out.")
    return found


def held_out_pictures(files: Sequence[Path]) -> set[int]:
    """The numbers of all pictures that records in these files test on."""
    records = [record for file in files for record in read_records(file)]
    return {record["image_id"] for record in records if record["split"] != "train"}


def _samples(
    name: str,
    refs: Path,
    place: Path,
    split: str,
    pictures: Path | None,
    turns: int,
    held_out: Sequence[Path],
) -> Iterator[dict[str, Any]]:
    records = records_of_split(read_records(refs), split, refs)
    annotations = annotations_of(refs, place, pictures)
    kept_back = held_out_pictures(held_out)
    by_picture: dict[int, list[dict]] = {}
    crowds = 0
    for record in records:
        with _naming(record):
            is_about_crowds = annotations.are_crowds(wanted_objects(record))
        crowds += is_about_crowds
        if not is_about_crowds and record["image_id"] not in kept_back:
            by_picture.setdefault(record["image_id"], []).append(record)
    if crowds:
        _logger.warning("%s: %d records are about crowds, which have no mask of one object. Left out.", refs, crowds)
    wordless = sum(not words for about in by_picture.values() for record in about for _, words in sentences_of(record))
    if wordless:
        _logger.warning("%s: %d expressions have no words. Left out.", refs, wordless)
    for number, about in by_picture.items():
        yield from _of_picture(name, number, about, annotations, turns)


def _of_picture(
    name: str, number: int, records: list[dict], annotations: Annotations, turns: int
) -> Iterator[dict[str, Any]]:
    file, size = annotations.picture(number)
    asked: list[tuple[str, list[dict]]] = []
    for record in records:
        with _naming(record):
            objects = annotations.without_crowds(wanted_objects(record))
            masks = [published_mask(annotations.segmentation(item, number), size) for item in objects]
            asked += [(words, masks) for _, words in sentences_of(record) if words]
    rng = rng_of(name, number)
    rng.shuffle(asked)
    parts = -(-len(asked) // turns)
    for part in range(parts):
        chosen = asked[part::parts]
        yield {
            "id": f"{name} {file.name}" + (f" {part + 1}" if parts > 1 else ""),
            "images": [file],
            "messages": conversation([expression_turn(rng, words, len(masks)) for words, masks in chosen]),
            "masks": [mask for _, masks in chosen for mask in masks],
        }


@contextmanager
def _naming(record: dict) -> Iterator[None]:
    """A ValueError in the block is about this record."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"expression record {record['ref_id']}: {error}") from None
