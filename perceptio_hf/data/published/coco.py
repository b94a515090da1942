"""COCO's instances: the name of a thing -> the masks of all of its kind.

    FOLDER/annotations/instances_train2017.json
    FOLDER/train2017/                              the pictures

A sample is a picture with a turn for each name in it, and some for names that are not in it: COCO annotates all things
of its 80 kinds, so that what is not annotated is not there.
"""

import functools
import os
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceptio_hf.data.formats.coco_annotations import PICTURES, Annotations, first_existing, read_annotations
from perceptio_hf.data.masks import EmptyMask, as_polygons, draw_polygons
from perceptio_hf.files import expanded

from .listing import listed, published_mask
from .referring import held_out_files, held_out_pictures
from .wording import conversation, name_turn, rng_of

if TYPE_CHECKING:
    from datasets import Dataset

_SMALL = 2  # pixels of a box's shorter side below which its polygons are looked at


def coco_instances(
    folder: str | os.PathLike,
    *,
    split: str = "train2017",
    pictures: str | os.PathLike | None = None,
    most_masks: int = 8,
    absent: int = 1,
    held_out: str | os.PathLike | None = None,
    missing: str = "raise",
) -> "Dataset":
    """One conversation for each picture, one turn for each name.

    Args:
        folder: COCO's, with `annotations/` and the folder of pictures; or a file of instances.
        split: which file of instances and folder of pictures.
        pictures: the folder of pictures, where it lies elsewhere.
        most_masks: names of which a picture shows more are not asked for, nor those of which it shows a crowd.
        absent: names that a picture does not show and that are asked for all the same.
        held_out: a folder with records of RefCOCO's family: pictures that these test on are left out. train2017 holds
            them all.
        missing: "raise", or "skip" to leave out pictures that are not there.

    Raises:
        ValueError: for files that are missing or damaged, annotations of pictures that are not listed, or pictures that
            are missing.
    """
    if most_masks < 1 or absent < 0:
        raise ValueError(f"most_masks is {most_masks} and absent {absent}; expected 1 or more, and 0 or more.")
    place = expanded(folder)
    name = f"instances_{split}.json"
    places = [place / "annotations" / name, place / name, place / "instances.json"]
    file = place if place.is_file() else first_existing(places, name)
    base = file.parent if place.is_file() else place
    folders = [base / split, base / "images" / split, base.parent / split, base.parent / "images" / split]
    seen_at = folders if pictures is None else [expanded(pictures)]
    kept_back = [] if held_out is None else held_out_files(held_out)
    samples = functools.partial(_samples, file, seen_at, most_masks, absent, kept_back)
    options = (split, most_masks, absent, os.path.abspath(first_existing(seen_at, PICTURES)))
    options += tuple(map(os.path.abspath, kept_back))
    return listed(place, [file, *kept_back], samples, missing=missing, options=options)


def _samples(
    file: Path, folders: list[Path], most_masks: int, absent: int, held_out: Sequence[Path]
) -> Iterator[dict[str, Any]]:
    annotations = read_annotations(file, folders)
    kept_back = held_out_pictures(held_out)
    by_picture: dict[int, list[dict]] = defaultdict(list)
    for item in annotations.objects.values():
        by_picture[item["image_id"]].append(item)
    unknown = [number for number in by_picture if number not in annotations.pictures]
    if unknown:
        raise ValueError(f"{file}: annotations speak of {len(unknown)} pictures that it does not list: {unknown[:5]}.")
    kinds = {item.get("category_id") for item in annotations.objects.values()} - annotations.names.keys()
    if kinds:
        raise ValueError(
            f"{file}: annotations are of {len(kinds)} categories that it does not name: {list(kinds)[:5]}."
        )
    for number, items in by_picture.items():
        if number not in kept_back:
            yield from _of_picture(file, number, items, annotations, most_masks, absent)


def _of_picture(
    file: Path, number: int, items: list[dict], annotations: Annotations, most_masks: int, absent: int
) -> Iterator[dict[str, Any]]:
    picture, size = annotations.picture(number)
    rng = rng_of("coco", number)
    for item in items:
        box = _box(item)
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(number, (int, float)) for number in box):
            raise ValueError(f"{file}: annotation {item['id']}: its bbox is {box!r}; expected 4 numbers, or none.")
    masks, turns = [], []
    for name, things in _asked(items, size, annotations.names, most_masks, absent, rng):
        turns.append(name_turn(rng, name, len(things)))
        for item in things:
            try:
                masks.append(published_mask(item.get("segmentation"), size))
            except ValueError as error:
                raise ValueError(f"{file}: annotation {item['id']}: {error}") from None
    if turns:
        yield {"id": f"coco {picture.name}", "images": [picture], "messages": conversation(turns), "masks": masks}


def _asked(
    items: list[dict],
    size: Sequence[int],
    names: Mapping[int, str],
    most_masks: int,
    absent: int,
    rng: random.Random,
) -> list[tuple[str, list[dict]]]:
    """(name, its things from left to right), in random order, without names whose things are not told one by one, or of
    which one has no mask."""
    things: dict[int, list[dict]] = defaultdict(list)
    for item in items:
        things[item["category_id"]].append(item)
    asked = [
        (names[kind], sorted(found, key=lambda item: _box(item)[0]))
        for kind, found in things.items()
        if len(found) <= most_masks and not any(item.get("iscrowd") or _holds_no_pixel(item, size) for item in found)
    ]
    others = sorted(name for kind, name in names.items() if kind not in things)
    asked += [(name, []) for name in rng.sample(others, min(absent, len(others)))]
    rng.shuffle(asked)
    return asked


def _box(item: dict) -> list:
    """x, y, width and height; a thing may have none."""
    return item.get("bbox") or [0, 0, 0, 0]


def _holds_no_pixel(item: dict, size: Sequence[int]) -> bool:
    """Whether an object is too small for its polygons to hold a pixel's centre; COCO has a few that are."""
    polygons = item.get("segmentation")
    if not isinstance(polygons, list) or not polygons or min(_box(item)[2:]) >= _SMALL:
        return False
    try:
        draw_polygons(as_polygons(polygons), *size)
    except EmptyMask:
        return True
    except ValueError:  # damage is told when the mask is opened
        return False
    return False
