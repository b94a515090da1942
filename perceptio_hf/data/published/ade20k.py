"""ADE20K's scene parsing: the names of what a picture shows -> their masks, several in one answer.

    FOLDER/objectInfo150.txt                          the names
    FOLDER/images/training/ADE_train_00000001.jpg     the pictures
    FOLDER/annotations/training/ADE_train_00000001.png   0 = other, 1 to 150 = the name's number

The label pictures are read once, into run lengths.
"""

import csv
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from perceptio_hf.data.formats.coco_annotations import first_existing
from perceptio_hf.data.run_length import encode_mask
from perceptio_hf.files import expanded

from .listing import listed
from .wording import conversation, names_turn, rng_of

if TYPE_CHECKING:
    from datasets import Dataset

NAMES_FILE = "objectInfo150.txt"


def ade20k(
    folder: str | os.PathLike,
    *,
    split: str = "training",
    names: int = 5,
    least: float = 0.005,
    missing: str = "raise",
) -> "Dataset":
    """One sample for each picture: some of its names, each with its mask.

    Args:
        folder: `ADEChallengeData2016` as it is published.
        split: "training" or "validation".
        names: that are asked for in one question at most; a picture with more has further turns.
        least: share of the picture that a name must cover to be asked for.
        missing: "raise", or "skip" to leave out pictures that are not there.

    Raises:
        ValueError: for files that are missing, a label picture that cannot be read or has numbers beyond the names, or
            a picture without its label picture.
    """
    if names < 1 or not 0 <= least < 1:
        raise ValueError(f"names is {names} and least {least}; expected 1 or more, and a share below 1.")
    place = expanded(folder)
    listing = first_existing([place / NAMES_FILE], NAMES_FILE)
    labels = first_existing([place / "annotations" / split], f"folder annotations/{split}")
    pictures = first_existing([place / "images" / split], f"folder images/{split}")
    files = sorted(labels.glob("*.png"))
    without = sorted({file.stem for file in pictures.glob("*.jpg")} - {file.stem for file in files})
    if without or not files:
        raise ValueError(
            f"{labels} lacks the label pictures of {len(without)} pictures: {', '.join(without[:5]) or 'it is empty'}."
        )
    samples = functools.partial(_samples, read_names(listing), files, pictures, names, least)
    return listed(place, [listing, *files], samples, missing=missing, options=(names, least, os.path.abspath(pictures)))


def read_names(file: Path) -> list[str]:
    """The first of the names of each number, number 1 first.

    Raises:
        ValueError: for a table of another form.
    """
    with open(file, encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    if not rows or not all(row.get("Name") and row.get("Idx", "").strip() == str(n) for n, row in enumerate(rows, 1)):
        raise ValueError(f"{file} is no table with the columns Idx (1, 2, ...) and Name; take it as published.")
    return [row["Name"].split(",")[0].strip() for row in rows]


def _samples(names: list[str], files: list[Path], pictures: Path, most: int, least: float) -> Iterator[dict[str, Any]]:
    for file in files:
        labels = _labels(file, len(names))
        counts = np.bincount(labels.ravel(), minlength=len(names) + 1)
        shown = [number for number in range(1, len(names) + 1) if counts[number] > least * labels.size]
        rng = rng_of("ade20k", file.stem)
        rng.shuffle(shown)
        if shown:
            turns = [shown[start : start + most] for start in range(0, len(shown), most)]
            yield {
                "id": f"ade20k {file.stem}",
                "images": [pictures / f"{file.stem}.jpg"],
                "messages": conversation([names_turn([names[number - 1] for number in turn]) for turn in turns]),
                "masks": [encode_mask(labels == number) for number in shown],
            }


def _labels(file: Path, most: int) -> np.ndarray:
    """(height, width) uint8, 0 to `most`."""
    try:
        with Image.open(file) as picture:
            labels = np.asarray(picture)
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ValueError(f"{file} cannot be read ({' '.join(str(error).split())[:100]}).") from None
    if labels.ndim != 2 or labels.dtype != np.uint8 or labels.max(initial=0) > most:
        raise ValueError(
            f"{file} holds {labels.dtype} of shape {labels.shape} up to {labels.max(initial=0)}; expected one number a "
            f"pixel, 0 to {most}, as in ADEChallengeData2016."
        )
    return labels
