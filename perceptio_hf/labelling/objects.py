"""Pairs of annotated objects, of which one is nearer: instances in COCO's form, questions without shortcuts.

Two questions that look the same without depth, that is, name the same two categories, with the same one lower in the
picture and the same one larger, are taken together, one for either answer. Rules on these are then right in half.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perceptio_hf.data.formats.coco_annotations import read_json
from perceptio_hf.data.masks import mask_of

MARGIN = 0.1  # of relative inverse depth, between the medians of two objects
_LEAST = 0.004  # share of a picture that an object covers
_MOST = 3  # questions about one picture
_NEEDED = ("images", "annotations", "categories")


@dataclass(frozen=True)
class Thing:
    """The only object of its category in a picture."""

    name: str
    segmentation: Any


@dataclass(frozen=True)
class PairQuestion:
    """Two objects of a picture, in the order in which they are named.

    Args:
        picture: the number of its row.
        first, second: the objects.
        answer: 0 or 1, which of them is nearer.
        looks: what can be seen without depth: the category that comes first in the alphabet, the other, whether the
            former is lower, whether it is larger.
    """

    picture: int
    first: Thing
    second: Thing
    answer: int
    looks: tuple[str, str, bool, bool]


class Annotations:
    """Instances in COCO's form, by picture.

    Raises:
        ValueError: for a file that is missing or of another form.
    """

    def __init__(self, file: Path):
        document = read_json(file)
        if not isinstance(document, dict) or not all(isinstance(document.get(key), list) for key in _NEEDED):
            raise ValueError(f"--annotations {file} is not of COCO's form: an object with {', '.join(_NEEDED)}.")
        try:
            self._things = _single_things(document)
            self._pictures = {image["file_name"]: image for image in document["images"]}
        except (KeyError, TypeError) as error:
            raise ValueError(f"--annotations {file} is not of COCO's form: {error} is missing somewhere.") from None
        self._by_name: dict[str, list[str]] = {}
        for name in self._pictures:
            self._by_name.setdefault(name.rpartition("/")[2], []).append(name)
        # Sets, since several threads ask.
        self.file, self.found, self.without, self.other_size = file, set(), set(), set()

    def check(self, names: Iterable[Sequence[str]]) -> None:
        """Raises ValueError where pictures of these names are given and none of them has annotations."""
        shown = None
        for of_one in names:
            if self._find(of_one) is not None:
                return
            shown = shown or of_one[0]
        if shown is not None:
            raise ValueError(
                f"--annotations {self.file} is about none of these pictures: their names are such as {shown}."
            )

    def of(self, names: Sequence[str], size: tuple[int, int]) -> list[Thing]:
        """The objects of a picture that can be named by their category; none where it has no annotations.

        Args:
            names: what it may be called: an id, a path.
            size: (width, height).
        """
        image = self._find(names)
        if image is None:
            self.without.add(names[0])
            return []
        self.found.add(image["file_name"])
        if (image.get("width", size[0]), image.get("height", size[1])) != size:
            self.other_size.add(names[0])
            return []
        return self._things.get(image["id"], [])

    def _find(self, names: Sequence[str]) -> dict[str, Any] | None:
        for name in names:
            alike = self._by_name.get(name.replace("\\", "/").rpartition("/")[2], [])
            exact = [other for other in alike if name == other or name.endswith(f"/{other}")]
            if exact or len(alike) == 1:
                return self._pictures[max(exact, key=len, default=alike[0])]
        return None

    def report(self) -> dict[str, int]:
        """What had no counterpart."""
        return {
            "pictures_without_annotations": len(self.without),
            "annotated_pictures_not_labelled": len(self._pictures) - len(self.found),
            "pictures_of_another_size_than_annotated": len(self.other_size),
        }


def _single_things(document: dict[str, Any]) -> dict[Any, list[Thing]]:
    """The objects that are alone in their category, by picture."""
    names = {category["id"]: category["name"] for category in document["categories"]}
    found: dict[Any, dict[str, list[Any]]] = {}
    for annotation in document["annotations"]:
        alike = found.setdefault(annotation["image_id"], {}).setdefault(names[annotation["category_id"]], [])
        alike.append(None if annotation.get("iscrowd") else annotation["segmentation"])
    return {
        picture: [Thing(name, alike[0]) for name, alike in sorted(by_name.items()) if len(alike) == 1 and alike[0]]
        for picture, by_name in found.items()
    }


def mask_of_thing(thing: Thing, size: tuple[int, int]) -> np.ndarray | None:
    """(height, width) bool, or None where the annotation cannot be read or has another size.

    Args:
        size: (width, height).
    """
    try:
        mask = mask_of(thing.segmentation, size[::-1])
    except ValueError:
        return None
    return mask if mask.shape == size[::-1] else None


def pairs_of(picture: int, things: Sequence[Thing], relative: np.ndarray, size: tuple[int, int]) -> list[PairQuestion]:
    """The pairs of objects of which one is clearly nearer.

    Args:
        relative: (h, w) relative inverse depth, of the picture's shape and any size.
        size: (width, height) of the picture.
    """
    seen = [(thing, found) for thing in things if (found := _measured(thing, relative, size)) is not None]
    pairs = []
    for number, (one, (depth, bottom, area)) in enumerate(seen):
        for other, (other_depth, other_bottom, other_area) in seen[number + 1 :]:
            if abs(depth - other_depth) >= MARGIN and bottom != other_bottom and area != other_area:
                looks = (one.name, other.name, bottom > other_bottom, area > other_area)
                pairs.append(PairQuestion(picture, one, other, int(other_depth > depth), looks))
    return pairs


def _measured(thing: Thing, relative: np.ndarray, size: tuple[int, int]) -> tuple[float, int, int] | None:
    """Median depth, lowest row, and pixels of an object that is large enough."""
    mask = mask_of_thing(thing, size)
    if mask is None or mask.sum() < _LEAST * mask.size:
        return None
    rows, columns = (
        (2 * np.arange(length) + 1) * side // (2 * length)
        for length, side in zip(relative.shape, mask.shape, strict=True)
    )
    inside = relative[mask[rows[:, None], columns]]
    if not inside.size:
        return None
    return float(np.median(inside)), int(np.flatnonzero(mask.any(1)).max()), int(mask.sum())


def balanced(pairs: Iterable[PairQuestion], rng: np.random.Generator) -> list[PairQuestion]:
    """As many questions as can be taken so that of all that look the same either answer is right in half.

    In which order two objects are named does not say anything either.
    """
    groups: dict[tuple, tuple[list[PairQuestion], list[PairQuestion]]] = {}
    for pair in pairs:
        groups.setdefault(pair.looks, ([], []))[pair.answer].append(pair)
    chosen, asked = [], {}
    for looks in sorted(groups):
        sides = [[side[place] for place in rng.permutation(len(side))] for side in groups[looks]]
        for couple in zip(*sides, strict=False):
            if any(asked.get(pair.picture, 0) >= _MOST for pair in couple):
                continue
            turned = bool(rng.integers(2))
            for pair in couple:
                asked[pair.picture] = asked.get(pair.picture, 0) + 1
                chosen.append(_turned(pair) if turned else pair)
    return sorted(chosen, key=lambda pair: pair.picture)


def _turned(pair: PairQuestion) -> PairQuestion:
    return PairQuestion(pair.picture, pair.second, pair.first, 1 - pair.answer, pair.looks)


def rule_shares(questions: Sequence[PairQuestion]) -> tuple[float, dict[str, float]]:
    """How often one is right by chance, and how often by rules that need no depth."""
    named_nearer = [(q.first, q.second)[q.answer].name for q in questions]
    lower = [q.looks[0 if q.looks[2] else 1] for q in questions]
    larger = [q.looks[0 if q.looks[3] else 1] for q in questions]
    shares = {
        "lower": float(np.mean([mine == right for mine, right in zip(lower, named_nearer, strict=True)])),
        "larger": float(np.mean([mine == right for mine, right in zip(larger, named_nearer, strict=True)])),
        "first_named": float(np.mean([q.answer == 0 for q in questions])),
        "category": _best_by_pair(questions, named_nearer),
    }
    return 0.5, shares


def _best_by_pair(questions: Sequence[PairQuestion], named_nearer: Sequence[str]) -> float:
    """How often the category that is more often the nearer of two is right, knowing these very questions."""
    counts: dict[tuple[str, str], list[int]] = {}
    for question, name in zip(questions, named_nearer, strict=True):
        counts.setdefault(question.looks[:2], [0, 0])[question.looks[:2].index(name)] += 1
    return sum(max(count) for count in counts.values()) / len(questions)
