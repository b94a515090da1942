"""RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO as they are published.

    FOLDER/refs(unc).p          pickled list of referring records (RefCOCOg: refs(umd).p); gRefCOCO: grefs(unc).json
    FOLDER/instances.json       COCO's annotations of their pictures
    FOLDER/train2014/           COCO's pictures

Also found are FOLDER/refcoco/refs(unc).p and the usual places of the pictures. Every sentence is one sample.
"""

from collections.abc import Iterator

from perceptio_hf.data.formats.coco_annotations import Annotations, first_existing
from perceptio_hf.data.formats.hub_tables import is_hub_table
from perceptio_hf.data.formats.referring_records import (
    FILES,
    annotations_of,
    read_records,
    record_places,
    records_of_split,
    sentences_of,
    wanted_objects,
)

from . import hub_refcoco
from .prompts import ask
from .reading import Request
from .registration import Prompt, benchmark
from .sample import PictureSource, Sample

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
    is_there = any(file.is_file() for file in record_places(request.path, request.name))
    if not is_there and is_hub_table(request.path):
        return hub_refcoco.read_hub_refcoco(request)
    return _read(request)


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
    return _read(request)


def _read(request: Request) -> Iterator[Sample]:
    refs = first_existing(record_places(request.path, request.name), FILES[request.name][0])
    records = records_of_split(read_records(refs), request.split, refs)
    annotations = annotations_of(refs, request.path)
    checked: dict[int, str | None] = {}
    for record in records:
        name = f"expression record {record['ref_id']}"
        with request.faults.item(name):
            yield from _samples(request.name, record, annotations, checked)


def _samples(
    benchmark: str, record: dict, annotations: Annotations, checked: dict[int, str | None]
) -> Iterator[Sample]:
    """One sample for each sentence about the same objects."""
    number = record["image_id"]
    file, size = annotations.picture(number)
    picture = PictureSource(file.name, file)
    if number not in checked:
        checked[number] = _picture_problem(picture, size)
    if checked[number]:
        raise ValueError(checked[number])
    objects = annotations.without_crowds(wanted_objects(record))
    masks = [annotations.mask(item, number, size) for item in objects]
    target = {"masks": masks, "no_target": not masks, "size": size}
    for sentence, words in sentences_of(record):
        question = ask(benchmark, expression=words)
        yield Sample(f"{record['ref_id']}-{sentence}", picture, question, target)


def _picture_problem(picture: PictureSource, size: list[int]) -> str | None:
    """What is wrong with the file of a picture, from its header alone."""
    if not picture.content.is_file():
        return f"there is no picture {picture.content}; complete the folder of COCO's pictures."
    try:
        (width, height), turned = picture.header()
    except ValueError as error:
        return str(error)
    if turned in range(2, 9):
        return (
            f"the picture {picture.name} is to be turned when it is shown (EXIF orientation {turned}), and annotations "
            "are of pictures as they are stored; store it without that tag, or leave the sample out."
        )
    if [height, width] != size:
        return (
            f"the picture {picture.name} is {height} x {width} and instances.json says {size[0]} x {size[1]} (height x "
            "width); take COCO's pictures at their own size."
        )
    return None
