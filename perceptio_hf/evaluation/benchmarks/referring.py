"""RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO as they are published.

    FOLDER/refs(unc).p          pickled list of referring records (RefCOCOg: refs(umd).p); gRefCOCO: grefs(unc).json
    FOLDER/instances.json       COCO's annotations of their pictures
    FOLDER/train2014/           COCO's pictures

Also found are FOLDER/refcoco/refs(unc).p and the usual places of the pictures. Every sentence is one sample.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perceptio_hf.data.run_length import RunLengths
from perceptio_hf.evaluation.benchmarks.formats.coco_masks import segmentation_mask
from perceptio_hf.evaluation.benchmarks.formats.hub_tables import is_hub_table
from perceptio_hf.evaluation.benchmarks.formats.plain_pickle import read_plain_pickle

from . import hub_refcoco
from .prompts import ask
from .reading import Request, first_existing
from .registration import Prompt, benchmark
from .sample import PictureSource, Sample

_RECORD = ("ref_id", "ann_id", "image_id", "split", "sentences")
_PICTURE_FOLDERS = ("train2014", "images/mscoco/images/train2014", "images/train2014", "coco/train2014", "images")


_FILES = "a folder with refs({by}).p, instances.json and COCO's train2014 pictures; or a Hub data set on disk"
_SA2VA = "Sa2VA's evaluation of referring segmentation"
_SEGMENT = Prompt("Please segment {expression} in this image.", _SA2VA)


@benchmark(
    "refcocog",
    "RefCOCOg: the same with longer expressions",
    files=_FILES.format(by="umd"),
    prompt=_SEGMENT,
    hub=("lmms-lab/RefCOCOg", "RefCOCOg"),
    task="referring_segmentation",
    spatial="seg",
    splits=("val", "test"),
)
@benchmark(
    "refcoco+",
    "RefCOCO+: the same without words for places",
    files=_FILES.format(by="unc"),
    prompt=_SEGMENT,
    hub=("lmms-lab/RefCOCOplus", "RefCOCO+"),
    task="referring_segmentation",
    spatial="seg",
    splits=("val", "testA", "testB"),
)
@benchmark(
    "refcoco",
    "RefCOCO: segment what an expression refers to",
    files=_FILES.format(by="unc"),
    prompt=_SEGMENT,
    hub=("lmms-lab/RefCOCO", "RefCOCO"),
    task="referring_segmentation",
    spatial="seg",
    splits=("val", "testA", "testB"),
)
def read_refcoco(request: Request) -> Iterator[Sample]:
    """RefCOCO, RefCOCO+ or RefCOCOg: one object for each expression.

    Raises:
        ValueError: for missing files, a split without expressions, or records that contradict the annotations.
    """
    files = ("refs(umd).p" if request.name == "refcocog" else "refs(unc).p", "refs(google).p")
    if not any(file.is_file() for file in _places(request, files)) and is_hub_table(request.path):
        return hub_refcoco.read_hub_refcoco(request)
    return _read(request, files)


@benchmark(
    "grefcoco",
    "gRefCOCO: expressions that refer to several objects, or to none",
    files="a folder with grefs(unc).json, instances.json and COCO's train2014 pictures",
    prompt=Prompt(_SEGMENT.template, f"{_SA2VA}, which has no other wording for expressions without a target"),
    hub=("grefcoco", "gRefCOCO"),
    task="referring_segmentation",
    spatial="auto",
    splits=("val", "testA", "testB"),
)
def read_grefcoco(request: Request) -> Iterator[Sample]:
    """gRefCOCO: any number of objects for each expression; ann_id [-1] stands for none. Errors as above."""
    return _read(request, ("grefs(unc).json", "grefs(unc).p"))


@dataclass(frozen=True)
class _Annotations:
    """instances.json and the pictures it speaks of."""

    pictures: Mapping[int, dict]
    objects: Mapping[int, dict]
    folder: Path
    _known: dict[int, RunLengths] = field(default_factory=dict)

    def picture(self, number: int) -> tuple[Path, list[int]]:
        """A picture's file and [height, width]."""
        record = self.pictures.get(number)
        if record is None:
            raise ValueError(f"picture {number} is not in instances.json; take the one published with the expressions.")
        return self.folder / record["file_name"], [int(record["height"]), int(record["width"])]

    def mask(self, number: int, picture: int, size: Sequence[int]) -> RunLengths:
        """An object's mask, made once."""
        if number not in self._known:
            record = self.objects.get(number)
            if record is None:
                raise ValueError(f"annotation {number} is not in instances.json.")
            if record["image_id"] != picture:
                raise ValueError(f"annotation {number} belongs to picture {record['image_id']}, not {picture}.")
            self._known[number] = segmentation_mask(record.get("segmentation"), *size)
        return self._known[number]


def _read(request: Request, files: Sequence[str]) -> Iterator[Sample]:
    path = request.path
    refs = first_existing(_places(request, files), files[0])
    records = _of_split(_records(refs), request.split, refs)
    annotations = _annotations(refs.parent, path if path.is_dir() else path.parent)
    checked: dict[int, str | None] = {}
    for record in records:
        name = f"expression record {record['ref_id']}"
        with request.faults.item(name):
            yield from _samples(request.name, record, annotations, checked)


def _places(request: Request, files: Sequence[str]) -> list[Path]:
    """Where the records may lie; the path may name their file, to choose another than the first."""
    if request.path.is_file():
        return [request.path] if request.path.suffix in (".p", ".json") else []
    return [folder / file for folder in (request.path, request.path / request.name) for file in files]


def _records(file: Path) -> list[dict]:
    """The referring records of a file, checked for what is used of them."""
    records = _read_json(file) if file.suffix == ".json" else read_plain_pickle(file)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{file} holds no list of referring records.")
    for number, record in enumerate(records):
        missing = [key for key in _RECORD if not isinstance(record, dict) or key not in record]
        if missing or not isinstance(record["sentences"], list) or not isinstance(record["image_id"], int):
            raise ValueError(f"{file}: record {number} lacks {', '.join(missing) or 'sentences, or its picture'}.")
    return records


def _of_split(records: list[dict], split: str | None, file: Path) -> list[dict]:
    chosen = [record for record in records if record["split"] == split]
    if not chosen:
        known = ", ".join(sorted({str(record["split"]) for record in records}))
        raise ValueError(f"{file} has no expressions of the split {split!r}; it has {known}.")
    return chosen


def _annotations(beside: Path, base: Path) -> _Annotations:
    file = first_existing([beside / "instances.json", base / "instances.json"], "instances.json")
    document = _read_json(file)
    if not isinstance(document, dict) or not {"images", "annotations"} <= set(document):
        raise ValueError(f"{file} has no `images` and `annotations`; take COCO's instances as published.")
    try:
        pictures = {
            item["id"]: {key: item[key] for key in ("file_name", "height", "width")} for item in document["images"]
        }
        objects = {item["id"]: item for item in document["annotations"] if "image_id" in item}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: an entry lacks {error}; take COCO's instances as published.") from None
    for kind, found in (("images", pictures), ("annotations", objects)):
        if len(found) != len(document[kind]):
            raise ValueError(f"{file}: {len(document[kind]) - len(found)} of the {kind} share an id with another.")
    places = [place / name for place in dict.fromkeys((base, beside, beside.parent)) for name in _PICTURE_FOLDERS]
    return _Annotations(pictures, objects, first_existing(places, "folder of COCO's pictures"))


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}); copy or download it again.") from None


def _samples(
    benchmark: str, record: dict, annotations: _Annotations, checked: dict[int, str | None]
) -> Iterator[Sample]:
    """One sample for each sentence about the same objects."""
    number = record["image_id"]
    file, size = annotations.picture(number)
    picture = PictureSource(file.name, file)
    if number not in checked:
        checked[number] = _picture_problem(picture, size)
    if checked[number]:
        raise ValueError(checked[number])
    wanted = record["ann_id"] if isinstance(record["ann_id"], list) else [record["ann_id"]]
    if not all(isinstance(item, int) for item in wanted):
        raise ValueError(f"its ann_id is {record['ann_id']!r:.60}; expected numbers of annotations.")
    wanted = [] if wanted == [-1] else wanted
    # A crowd has no outline of its own; gRefCOCO's evaluation leaves it out of the objects meant.
    objects = [item for item in wanted if not annotations.objects.get(item, {}).get("iscrowd")]
    if wanted and not objects:
        raise ValueError(f"its annotations {wanted} are all crowds, which have no mask of one object.")
    masks = [annotations.mask(item, number, size) for item in objects]
    target = {"masks": masks, "no_target": not masks, "size": size}
    for sentence in record["sentences"]:
        if not isinstance(sentence, dict) or not {"sent", "sent_id"} <= set(sentence):
            raise ValueError("a sentence lacks `sent` or `sent_id`.")
        question = ask(benchmark, expression=str(sentence["sent"]).strip())
        yield Sample(f"{record['ref_id']}-{sentence['sent_id']}", picture, question, target)


def _picture_problem(picture: PictureSource, size: list[int]) -> str | None:
    """What is wrong with the file of a picture, from its header alone."""
    if not picture.content.is_file():
        return f"there is no picture {picture.content}; complete the folder of COCO's pictures."
    try:
        width, height = picture.size()
    except ValueError as error:
        return str(error)
    if [height, width] != size:
        return (
            f"the picture {picture.name} is {height} x {width} and instances.json says {size[0]} x {size[1]} (height x "
            "width); take COCO's pictures at their own size."
        )
    return None
