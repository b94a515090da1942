"""RefCOCO's and gRefCOCO's published files: every sentence with the mask that pycocotools makes of its annotation."""

import json
import pickle
import shutil

import numpy as np
import pytest
from evaluation.published_formats import (
    file_name,
    refcoco_records,
    scenes_of,
    write_coco,
    write_grefcoco,
    write_refcoco,
)
from PIL import Image

from perceptio_hf.data.run_length import decode_mask
from perceptio_hf.evaluation.benchmarks import open_benchmark

coco = pytest.importorskip("pycocotools.mask")


@pytest.fixture(scope="module")
def scenes():
    return scenes_of(range(4))


@pytest.fixture
def folder(tmp_path, scenes):
    write_refcoco(tmp_path, scenes)
    return tmp_path


def truth(folder) -> dict[int, np.ndarray]:
    """Masks by annotation, by pycocotools alone."""
    document = json.loads((folder / "instances.json").read_text())
    sizes = {item["id"]: (item["height"], item["width"]) for item in document["images"]}
    masks = {}
    for item in document["annotations"]:
        lengths = coco.frPyObjects(item["segmentation"], *sizes[item["image_id"]])
        decoded = coco.decode(lengths)
        masks[item["id"]] = decoded.any(-1) if decoded.ndim == 3 else decoded.astype(bool)
    return masks


@pytest.mark.parametrize(("name", "by"), [("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")])
@pytest.mark.parametrize("split", ["val", "testB"])
def test_every_sentence_with_its_mask(tmp_path, scenes, name, by, split):
    records = write_refcoco(tmp_path, scenes, by=by)
    masks = truth(tmp_path)
    read = open_benchmark(name, tmp_path, split=split)
    expected = [
        (record, sentence) for record in records if record["split"] == split for sentence in record["sentences"]
    ]
    assert len(read.samples) == len(expected) > 0 and read.task == "referring_segmentation" and read.spatial == "seg"
    for sample, (record, sentence) in zip(read.samples, expected, strict=True):
        assert sample.id == f"{record['ref_id']}-{sentence['sent_id']}"
        assert sample.question == f"Please segment {sentence['sent']} in this image."
        (mask,) = sample.target["masks"]
        assert (decode_mask(mask) == masks[record["ann_id"]]).all()
        assert sample.target["size"] == [64, 64] and not sample.target["no_target"]
        assert sample.picture.open().size == (64, 64)
    json.dumps([sample.target for sample in read.samples])


@pytest.mark.parametrize("protocol", (0, 1, 4))
def test_pickles_of_every_age(tmp_path, scenes, protocol):
    write_refcoco(tmp_path, scenes, protocol=protocol)
    assert len(open_benchmark("refcoco", tmp_path, limit=3).samples) == 3


def test_pictures_are_found_where_they_usually_lie(tmp_path, scenes):
    root = tmp_path / "data"
    write_refcoco(root / "refcoco", scenes)
    first = open_benchmark("refcoco", root / "refcoco")
    (root / "images" / "mscoco" / "images").mkdir(parents=True)
    shutil.move(root / "refcoco" / "train2014", root / "images" / "mscoco" / "images" / "train2014")
    for path in (root, root / "refcoco", root / "refcoco" / "refs(unc).p"):
        assert open_benchmark("refcoco", path).data_hash == first.data_hash


def test_another_division_is_chosen_by_its_file(folder, scenes):
    records = refcoco_records(json.loads((folder / "instances.json").read_text()), splits=("val",))
    (folder / "refs(google).p").write_bytes(pickle.dumps(records[:3], 2))
    assert len(open_benchmark("refcoco", folder / "refs(google).p").samples) == 6


def test_grefcoco(tmp_path, scenes):
    records = write_grefcoco(tmp_path, scenes)
    masks = truth(tmp_path)
    read = open_benchmark("grefcoco", tmp_path)
    assert len(read.samples) == len(records) and read.spatial == "auto"
    for sample, record in zip(read.samples, records, strict=True):
        wanted = [] if record["no_target"] else record["ann_id"]
        assert sample.target["no_target"] == record["no_target"]
        assert [decode_mask(mask).tolist() for mask in sample.target["masks"]] == [masks[k].tolist() for k in wanted]
    assert {len(sample.target["masks"]) for sample in read.samples} == {0, 1, 2}


def test_crowds_do_not_count_as_objects(tmp_path, scenes):
    records = write_grefcoco(tmp_path, scenes)
    document = json.loads((tmp_path / "instances.json").read_text())
    crowd = records[1]["ann_id"][0]
    next(item for item in document["annotations"] if item["id"] == crowd)["iscrowd"] = 1
    (tmp_path / "instances.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"record 0: its annotations \[{crowd}\] are all crowds"):
        open_benchmark("grefcoco", tmp_path)
    read = open_benchmark("grefcoco", tmp_path, on_error="skip")
    assert [len(sample.target["masks"]) for sample in read.samples[:2]] == [1, 0]
    assert len(read.notes) == 1 and "record 0" in read.notes[0]


def test_listing_decodes_nothing(folder, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("a picture was decoded"))
    assert open_benchmark("refcoco", folder).samples


def edit(folder, change) -> None:
    document = json.loads((folder / "instances.json").read_text())
    change(document)
    (folder / "instances.json").write_text(json.dumps(document))


def drop(document: dict, kind: str, number: int) -> None:
    document[kind] = [item for item in document[kind] if item["id"] != number]


def first_polygon(document: dict) -> dict:
    return next(item for item in document["annotations"] if isinstance(item["segmentation"], list))


CASES = {
    "picture missing": (
        lambda folder: (folder / "train2014" / file_name(1)).unlink(),
        rf"record \d+: there is no picture .*{file_name(1)}",
    ),
    "picture cut off": (
        lambda folder: (folder / "train2014" / file_name(1)).write_bytes(b"\xff\xd8\xff"),
        rf"record \d+: the picture {file_name(1)} cannot be read",
    ),
    "picture of another size": (
        lambda folder: Image.new("RGB", (30, 20)).save(folder / "train2014" / file_name(1)),
        rf"{file_name(1)} is 20 x 30 and instances.json says 64 x 64",
    ),
    "picture not in instances": (
        lambda folder: edit(folder, lambda document: drop(document, "images", 1)),
        r"picture 1 is not in instances\.json",
    ),
    "annotation missing": (
        lambda folder: edit(folder, lambda document: drop(document, "annotations", 101)),
        r"annotation 101 is not in instances\.json",
    ),
    "annotation of another picture": (
        lambda folder: edit(folder, lambda document: document["annotations"][0].update(image_id=2)),
        r"annotation 101 belongs to picture 2, not 1",
    ),
    "run lengths of another size": (
        lambda folder: edit(
            folder, lambda document: first_polygon(document).update(segmentation={"size": [2, 3], "counts": [0, 6]})
        ),
        r"its run lengths are 2 x 3 and its picture 64 x 64",
    ),
    "no segmentation": (
        lambda folder: edit(folder, lambda document: first_polygon(document).pop("segmentation")),
        "neither polygons nor run lengths",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_single_faults_are_named_and_can_be_left_out(folder, scenes, case):
    spoil, message = CASES[case]
    whole = open_benchmark("refcoco", folder)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        open_benchmark("refcoco", folder)
    rest = open_benchmark("refcoco", folder, on_error="skip")
    assert 0 < len(rest.samples) < len(whole.samples) and rest.notes
    kept = {sample.id: sample.target for sample in whole.samples}
    assert all(kept[sample.id] == sample.target for sample in rest.samples)


def duplicate_annotation(document: dict) -> None:
    document["annotations"].append(document["annotations"][0])


WHOLE = {
    "no records": (lambda folder: (folder / "refs(unc).p").unlink(), r"There is no refs\(unc\)\.p; looked for .*refs"),
    "no instances": (lambda folder: (folder / "instances.json").unlink(), r"There is no instances\.json"),
    "no pictures": (lambda folder: shutil.rmtree(folder / "train2014"), r"There is no folder of COCO's pictures"),
    "instances cut off": (lambda folder: (folder / "instances.json").write_text('{"images": ['), "is not JSON"),
    "other JSON": (lambda folder: (folder / "instances.json").write_text("[]"), "has no `images` and `annotations`"),
    "an entry without size": (
        lambda folder: edit(folder, lambda document: document["images"][0].pop("height")),
        "an entry lacks 'height'",
    ),
    "one id twice": (lambda folder: edit(folder, duplicate_annotation), "1 of the annotations share an id"),
    "another pickle": (
        lambda folder: (folder / "refs(unc).p").write_bytes(pickle.dumps({"a": 1})),
        "holds no list of referring records",
    ),
    "records of another kind": (
        lambda folder: (folder / "refs(unc).p").write_bytes(pickle.dumps([{"ref_id": 1}])),
        "record 0 lacks ann_id, image_id, split, sentences",
    ),
    "code in the pickle": (
        lambda folder: (folder / "refs(unc).p").write_bytes(pickle.dumps([print])),
        r"refused: it names builtins\.print",
    ),
}


@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_whole_files_that_cannot_be_used(folder, case, on_error):
    spoil, message = WHOLE[case]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        open_benchmark("refcoco", folder, on_error=on_error)


def test_a_split_that_is_not_there(folder):
    with pytest.raises(ValueError, match=r"no expressions of the split 'test'; it has testA, testB, train, val"):
        open_benchmark("refcoco", folder, split="test")


def test_one_record_twice(folder):
    records = pickle.loads((folder / "refs(unc).p").read_bytes())
    (folder / "refs(unc).p").write_bytes(pickle.dumps([records[0], records[0]]))
    with pytest.raises(ValueError, match=r"0-0: this id occurs twice"):
        open_benchmark("refcoco", folder)
    assert len(open_benchmark("refcoco", folder, on_error="skip").samples) == 2


@pytest.mark.parametrize("orientation", [2, 3, 6])
def test_annotations_of_a_picture_that_is_turned_when_it_is_shown(tmp_path, scenes, orientation):
    """They are of the picture as it is stored; COCO's tools do not turn it."""
    write_refcoco(tmp_path, scenes)
    exif = Image.Exif()
    for file in (tmp_path / "train2014").iterdir():
        exif[0x0112] = orientation
        Image.open(file).save(file, exif=exif)
    with pytest.raises(ValueError, match=rf"is to be turned .*EXIF orientation {orientation}"):
        open_benchmark("refcoco", tmp_path, split="val")


def test_a_sentence_without_words(folder):
    records = pickle.loads((folder / "refs(unc).p").read_bytes())
    del records[0]["sentences"][1]["sent"]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(records))
    with pytest.raises(ValueError, match=r"record 0: a sentence lacks `sent`"):
        open_benchmark("refcoco", folder)


def test_another_coco_folder(tmp_path, scenes):
    write_coco(tmp_path, scenes)
    with pytest.raises(ValueError, match=r"There is no refs\(umd\)\.p"):
        open_benchmark("refcocog", tmp_path)
