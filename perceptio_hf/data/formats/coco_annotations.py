"""COCO's instances and its pictures on disk, as annotations of RefCOCO and others speak of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perceptio_hf.data.run_length import RunLengths

from .coco_masks import segmentation_mask

PICTURE_FOLDERS = ("train2014", "images/mscoco/images/train2014", "images/train2014", "coco/train2014", "images")
PICTURES = "folder of COCO's pictures"  # what is missing where there is none
_PICTURE_KEYS = ("file_name", "height", "width")


@dataclass(frozen=True)
class Annotations:
    """instances.json and the pictures it speaks of.

    pictures: id -> {"file_name", "height", "width"}; objects: id -> COCO's annotation; names: of the categories, by id;
    folder: of the pictures.
    """

    pictures: Mapping[int, dict]
    objects: Mapping[int, dict]
    names: Mapping[int, str]
    folder: Path
    _known: dict[int, RunLengths] = field(default_factory=dict)

    def picture(self, number: int) -> tuple[Path, list[int]]:
        """A picture's file and [height, width].

        Raises:
            ValueError: where it is not listed.
        """
        record = self.pictures.get(number)
        if record is None:
            raise ValueError(f"picture {number} is not in instances.json; take the one published with the expressions.")
        return self.folder / record["file_name"], [int(record["height"]), int(record["width"])]

    def segmentation(self, number: int, picture: int) -> Any:
        """An object's segmentation as it is published: polygons or run lengths.

        Raises:
            ValueError: where it is not listed, or belongs to another picture.
        """
        record = self.objects.get(number)
        if record is None:
            raise ValueError(f"annotation {number} is not in instances.json.")
        if record["image_id"] != picture:
            raise ValueError(f"annotation {number} belongs to picture {record['image_id']}, not {picture}.")
        return record.get("segmentation")

    def mask(self, number: int, picture: int, size: Sequence[int]) -> RunLengths:
        """An object's mask, made once."""
        if number not in self._known:
            self._known[number] = segmentation_mask(self.segmentation(number, picture), *size)
        return self._known[number]

    def without_crowds(self, numbers: Sequence[int]) -> list[int]:
        """Those that are single objects: a crowd has no outline of its own, and evaluations leave it out.

        Raises:
            ValueError: where there are some, and all are crowds.
        """
        if self.are_crowds(numbers):
            raise ValueError(f"its annotations {list(numbers)} are all crowds, which have no mask of one object.")
        return [number for number in numbers if not self._is_crowd(number)]

    def are_crowds(self, numbers: Sequence[int]) -> bool:
        """Whether there are some, and all are crowds."""
        return bool(numbers) and all(map(self._is_crowd, numbers))

    def _is_crowd(self, number: int) -> bool:
        return bool(self.objects.get(number, {}).get("iscrowd"))


def read_annotations(file: Path, folders: Sequence[Path]) -> Annotations:
    """Read COCO's instances.

    Args:
        file: the .json file.
        folders: where its pictures may lie; the first that exists is taken.

    Raises:
        ValueError: for a file of another form, ids that occur twice, or where no folder exists.
    """
    document = read_json(file)
    if not isinstance(document, dict) or not {"images", "annotations"} <= set(document):
        raise ValueError(f"{file} has no `images` and `annotations`; take COCO's instances as published.")
    try:
        pictures = {item["id"]: {key: item[key] for key in _PICTURE_KEYS} for item in document["images"]}
        objects = {item["id"]: item for item in document["annotations"] if "image_id" in item}
        names = {item["id"]: item["name"] for item in document.get("categories", ())}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: an entry lacks {error}; take COCO's instances as published.") from None
    _check_entries(file, pictures, objects, names)
    for kind, found in (("images", pictures), ("annotations", objects)):
        if len(found) != len(document[kind]):
            raise ValueError(f"{file}: {len(document[kind]) - len(found)} of the {kind} share an id with another.")
    return Annotations(pictures, objects, names, first_existing(folders, PICTURES))


def _check_entries(file: Path, pictures: Mapping, objects: Mapping, names: Mapping) -> None:
    """ValueError naming the first entry whose values are not of the kind that is published."""
    for number, item in pictures.items():
        name, sides = item["file_name"], (item["height"], item["width"])
        if not isinstance(name, str) or not name:
            raise ValueError(f"{file}: picture {number}: its file_name is {name!r}; expected a file's name.")
        if not all(isinstance(side, (int, float)) and side >= 1 for side in sides):
            raise ValueError(f"{file}: picture {number}: its height and width are {sides}; expected two numbers.")
    for number, item in objects.items():
        for key in ("image_id", "category_id"):
            if not isinstance(item.get(key, 0), (int, str)):
                raise ValueError(f"{file}: annotation {number}: its {key} is {item[key]!r}; expected a number.")
    for number, name in names.items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{file}: category {number}: its name is {name!r}; expected words.")


def read_json(file: Path) -> Any:
    """A JSON document.

    Raises:
        ValueError: naming a file that is none.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}); copy or download it again.") from None


def first_existing(places: Sequence[Path], what: str) -> Path:
    """The first of `places` that exists.

    Raises:
        ValueError: naming all of them.
    """
    for place in places:
        if place.exists():
            return place
    raise ValueError(f"There is no {what}; looked for {', '.join(map(str, places))}.")
