"""Sources of published data, on small files in the published form, through the collator's reader."""

import json
import os
import pickle
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from evaluation.published_formats import (
    SIZE,
    file_name,
    scenes_of,
    write_coco,
    write_grefcoco,
    write_parquet,
    write_refcoco,
)
from helpers import picture
from PIL import Image

from perceptio_hf.data import lines
from perceptio_hf.data.published.listing import with_pictures
from perceptio_hf.data.rows import dataset_of, import_datasets
from perceptio_hf.data.samples import check_sample, load_sample
from perceptio_hf.data.tasks import load_tasks


@pytest.fixture(scope="module")
def scenes():
    return scenes_of(range(4))


def load(task: dict, folder=None):
    datasets, _ = load_tasks([task], None if folder is None else str(folder))
    return next(iter(datasets.values()))


def loaded(row: dict):
    return load_sample(row, num_depth_tokens=64, num_depth_codes=128)


def answers(row: dict) -> list[str]:
    return [message["content"][0]["text"] for message in row["messages"] if message["role"] == "assistant"]


def questions(row: dict) -> list[str]:
    return [message["content"][0]["text"] for message in row["messages"] if message["role"] == "user"]


# --- RefCOCO's family ---


@pytest.mark.parametrize(("name", "by"), [("refcoco", "unc"), ("refcocop", "unc"), ("refcocog", "umd")])
def test_all_expressions_of_a_picture_are_one_conversation(name, by, scenes, tmp_path):
    folder = tmp_path / name.replace("cocop", "coco+")
    records = [r for r in write_refcoco(folder, scenes, by=by) if r["split"] == "train"]
    dataset = load({name: str(folder)})
    assert [row["images"][0]["path"] for row in dataset] == list(
        dict.fromkeys(str(folder / "train2014" / file_name(r["image_id"])) for r in records)
    )
    for row in dataset:
        number = int(row["id"][-16:-4])
        about = [record for record in records if record["image_id"] == number]
        asked = sorted(question for question in questions(row))
        assert len(asked) == 2 * len(about)
        for record in about:
            assert sum(f"thing {record['ann_id']}" in question for question in asked) == 2
        sample = loaded(row)
        order = [next(r["ann_id"] for r in about if f"thing {r['ann_id']}" in text) for text in questions(row)]
        for mask, annotation in zip(sample.masks, order, strict=True):
            true = scenes[number - 1].mask(annotation % 100)
            assert (mask & true).sum() >= 0.9 * true.sum()


def test_long_conversations_are_divided(scenes, tmp_path):
    write_refcoco(tmp_path, scenes)
    whole, parts = load({"refcoco": str(tmp_path)}), load({"refcoco": str(tmp_path), "turns": 1})
    assert max(len(answers(row)) for row in whole) > 1 and all(len(answers(row)) == 1 for row in parts)
    assert sorted(text for row in whole for text in questions(row)) == sorted(
        q for row in parts for q in questions(row)
    )
    assert len(set(parts["id"])) == len(parts)


def test_expressions_that_mean_several_or_nothing(scenes, tmp_path):
    records = write_grefcoco(tmp_path, scenes, split="train")
    dataset = load({"grefcoco": str(tmp_path)})
    assert len(dataset) == len(scenes)
    for row in dataset:
        sample, said = loaded(row), answers(row)
        assert sorted(text.count("[SEG]") for text in said) == [0, 1, 2] and len(sample.masks) == 3
        for question, answer in zip(questions(row), said, strict=True):
            record = next(r for r in records if r["sentences"][0]["sent"] in question and r["file_name"] in row["id"])
            assert answer.count("[SEG]") == (0 if record["no_target"] else len(record["ann_id"]))


def test_expressions_about_crowds_are_left_out(scenes, tmp_path, caplog):
    records = write_grefcoco(tmp_path, scenes, split="train")
    document = json.loads((tmp_path / "instances.json").read_text())
    crowd = records[0]["ann_id"][0]
    next(item for item in document["annotations"] if item["id"] == crowd)["iscrowd"] = 1
    (tmp_path / "instances.json").write_text(json.dumps(document))
    first = load({"grefcoco": str(tmp_path)})[0]
    assert sorted(text.count("[SEG]") for text in answers(first)) == [0, 1]
    assert "grefs(unc).json: 1 records are about crowds" in caplog.text


def test_pictures_that_others_test_on_are_held_out(scenes, tmp_path):
    write_refcoco(tmp_path / "mine", scenes)
    write_refcoco(tmp_path / "others" / "refcocog", scenes, by="umd")
    file = tmp_path / "others" / "refcocog" / "refs(umd).p"
    records = [record for record in pickle.loads(file.read_bytes()) if record["image_id"] == 2]
    file.write_bytes(pickle.dumps([record | {"split": "test"} for record in records], 2))
    whole = load({"refcoco": "mine"}, tmp_path)
    held = load({"refcoco": "mine", "held_out": "others"}, tmp_path)
    assert file_name(2) in whole["id"][1]
    assert len(held) == len(whole) - 1 and not any(file_name(2) in name for name in held["id"])
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "refcocog").symlink_to(tmp_path / "others" / "refcocog")
    assert load({"refcoco": "mine", "held_out": "links"}, tmp_path)["id"][:] == held["id"][:]
    with pytest.raises(ValueError, match="holds no records of RefCOCO's family"):
        load({"refcoco": "mine", "held_out": "mine/train2014"}, tmp_path)


def test_an_annotation_without_its_picture(scenes, tmp_path):
    write_refcoco(tmp_path, scenes)
    (tmp_path / "train2014" / file_name(1)).unlink()
    with pytest.raises(ValueError, match=rf"1 pictures are missing, of 1 of 4 samples: .*{file_name(1)}\. Complete"):
        load({"refcoco": str(tmp_path)})
    assert len(load({"refcoco": str(tmp_path), "missing": "skip"})) == 3
    shutil.rmtree(tmp_path / "train2014")
    (tmp_path / "train2014").mkdir()
    with pytest.raises(ValueError, match="4 pictures are missing, of 4 of 4 samples"):
        load({"refcoco": str(tmp_path), "missing": "skip"})


def test_a_record_that_contradicts_its_annotations_is_named(scenes, tmp_path):
    records = write_refcoco(tmp_path, scenes)
    wrong = next(record for record in records if record["split"] == "train")
    document = json.loads((tmp_path / "instances.json").read_text())
    next(a for a in document["annotations"] if a["id"] == wrong["ann_id"])["image_id"] = 99
    (tmp_path / "instances.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"record {wrong['ref_id']}: annotation \d+ belongs to picture 99"):
        load({"refcoco": str(tmp_path)})


def test_a_record_that_means_no_object_is_named_and_one_without_words_asks_nothing(scenes, tmp_path, caplog):
    records = write_refcoco(tmp_path, scenes)
    train = [record for record in records if record["split"] == "train"]
    before = [questions(row) for row in load({"refcoco": str(tmp_path)})]
    train[0]["sentences"].append({"sent": " ", "sent_id": 999})
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(records))
    found = [questions(row) for row in load({"refcoco": str(tmp_path)})]
    assert sum(map(len, found)) == sum(map(len, before)) and "1 expressions have no words. Left out" in caplog.text
    train[0]["ann_id"] = []
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(records))
    with pytest.raises(ValueError, match=rf"record {train[0]['ref_id']}: its ann_id is \[\]; expected numbers"):
        load({"refcoco": str(tmp_path)})


def test_a_picture_of_another_size_than_its_polygons(scenes, tmp_path):
    write_refcoco(tmp_path, scenes)
    Image.new("RGB", (SIZE * 2, SIZE)).save(tmp_path / "train2014" / file_name(1))
    row = next(row for row in load({"refcoco": str(tmp_path)}) if file_name(1) in row["id"])
    with pytest.raises(ValueError, match=rf"mask 0 is {SIZE} x {SIZE} pixels and its picture {SIZE * 2} x {SIZE}"):
        loaded(row)


def test_large_files_are_read_once(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("perceptio_hf.data.published.listing.MOST_IN_MEMORY", 10)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    written = []
    monkeypatch.setattr(lines, "_write", lambda *given, real=lines._write: written.append(1) or real(*given))
    records = write_refcoco(tmp_path, scenes)
    plain = list(load({"refcoco": str(tmp_path)}))
    assert list(load({"refcoco": str(tmp_path)})) == plain and len(written) == 1
    load({"refcoco": str(tmp_path), "turns": 1})
    assert len(written) == 2
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([r | {"split": "train"} for r in records], 2))
    assert list(load({"refcoco": str(tmp_path)})) != plain and len(written) == 3


def test_what_was_read_once_is_read_again_where_pictures_moved_or_more_are_held_out(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("perceptio_hf.data.published.listing.MOST_IN_MEMORY", 10)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_refcoco(tmp_path / "refcoco", scenes)
    write_instances(tmp_path / "coco", scenes)
    write_refcoco(tmp_path / "refs", scenes[:1])
    tasks = [{"refcoco": "refcoco", "held_out": "refs"}, {"coco_instances": "coco", "held_out": "refs"}]
    written = []
    monkeypatch.setattr(lines, "_write", lambda *given, real=lines._write: written.append(1) or real(*given))
    before = [len(load(task, tmp_path)) for task in tasks]
    for _ in range(2):  # a recipe beside it that holds nothing out has a copy of its own
        without = [len(load({key: task[key] for key in task if key != "held_out"}, tmp_path)) for task in tasks]
        assert [len(load(task, tmp_path)) for task in tasks] == before
    assert without == [count + 1 for count in before] and len(written) == 4
    tested = {"ref_id": 0, "ann_id": 1, "image_id": 2, "split": "test", "sentences": []}
    (tmp_path / "refs" / "refs(google).p").write_bytes(pickle.dumps([tested]))  # as in the published archive: not asked
    assert [len(load(task, tmp_path)) for task in tasks] == before
    (tmp_path / "refs" / "more").mkdir()
    (tmp_path / "refs" / "more" / "refs(google).p").write_bytes(pickle.dumps([tested]))
    assert [len(load(task, tmp_path)) for task in tasks] == [count - 1 for count in before]
    (tmp_path / "refcoco" / "train2014").rename(tmp_path / "refcoco" / "images")
    (tmp_path / "coco" / "train2017").rename(tmp_path / "coco" / "moved")
    tasks[1]["pictures"] = "coco/moved"
    folders = [os.path.dirname(load(task, tmp_path)[0]["images"][0]["path"]) for task in tasks]
    assert folders == [str(tmp_path / "refcoco" / "images"), str(tmp_path / "coco" / "moved")]


# --- COCO ---


def write_instances(folder, scenes) -> dict:
    """COCO's own folders: two names, one crowd."""
    document = write_coco(folder, scenes, pictures="train2017")
    document["categories"] = [{"id": 1, "name": "ball"}, {"id": 2, "name": "box"}, {"id": 3, "name": "zebra"}]
    for item in document["annotations"]:
        item["category_id"] = 1 + item["id"] % 2
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "instances.json").unlink()
    # As editors of Windows save it, with a byte order mark.
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps(document), encoding="utf-8-sig")
    return document


def test_names_and_all_their_masks(scenes, tmp_path):
    document = write_instances(tmp_path, scenes)
    dataset = load({"coco_instances": str(tmp_path)})
    assert len(dataset) == len(scenes)
    names = {1: "ball", 2: "box", 3: "zebra"}
    for number, row in enumerate(dataset, 1):
        here = [item for item in document["annotations"] if item["image_id"] == number]
        masks = iter(loaded(row).masks)
        for question, answer in zip(questions(row), answers(row), strict=True):
            kind = next(kind for kind, name in names.items() if name in question)
            things = sorted((a for a in here if a["category_id"] == kind), key=lambda item: item["bbox"][0])
            assert answer.count("[SEG]") == len(things) and (things or answer.startswith("There is no"))
            for item in things:
                true = scenes[number - 1].mask(item["id"] % 100)
                assert (next(masks) & true).sum() >= 0.9 * true.sum()
        assert next(masks, None) is None
        present = {item["category_id"] for item in here}
        absent = [question for question in questions(row) if not any(names[kind] in question for kind in present)]
        assert len(absent) == 1  # and no name that is there is forgotten
        assert len(questions(row)) == len(present) + 1


@pytest.mark.parametrize("box", [None, [], "absent"])
def test_things_without_a_box(box, scenes, tmp_path):
    document = write_instances(tmp_path, scenes)
    asked = [questions(row) for row in load({"coco_instances": str(tmp_path)})]
    for item in document["annotations"][:4]:
        item.update(bbox=box) if box != "absent" else item.pop("bbox")
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(document))
    assert [questions(row) for row in load({"coco_instances": str(tmp_path)})] == asked


def _first(kind: str, **values):
    """Something that is done to the first entry of a kind in instances.json."""
    return lambda document: document[kind][0].update(values)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_first("images", height=None), r"picture 1: its height and width are \(None, \d+\)"),
        (_first("images", width="x"), r"picture 1: its height and width are \(\d+, 'x'\)"),
        (_first("images", file_name=None), "picture 1: its file_name is None"),
        (_first("annotations", category_id=[1]), r"annotation \d+: its category_id is \[1\]"),
        (_first("annotations", image_id=[1]), r"annotation \d+: its image_id is \[1\]"),
        (
            _first("annotations", segmentation={"size": None, "counts": "ab"}),
            r"annotation \d+: its run lengths are None",
        ),
        (_first("annotations", segmentation={"size": [48, 48]}), r"annotation \d+: its run lengths have no counts"),
        (_first("categories", name=None), "category 1: its name is None; expected words"),
        (_first("categories", name=" "), "category 1: its name is ' '; expected words"),
    ],
)
def test_entries_of_another_kind_are_named(spoil, message, scenes, tmp_path):
    document = write_instances(tmp_path, scenes)
    spoil(document)
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"instances_train2017\.json: {message}"):
        load({"coco_instances": str(tmp_path)})


def test_a_box_of_another_form_is_named(scenes, tmp_path):
    document = write_instances(tmp_path, scenes)
    document["annotations"][0]["bbox"] = [1, "2", 3]
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"annotation \d+: its bbox is \[1, '2', 3\]; expected 4 numbers"):
        load({"coco_instances": str(tmp_path)})


def test_crowds_and_too_many_things_are_not_asked_for(scenes, tmp_path):
    document = write_instances(tmp_path, scenes)
    for item in document["annotations"]:
        item["iscrowd"] = int(item["image_id"] == 1 and item["category_id"] == 1)
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(document))
    first = load({"coco_instances": str(tmp_path), "absent": 0})[0]
    assert not any("ball" in question for question in questions(first))
    few = load({"coco_instances": str(tmp_path), "absent": 0, "most_masks": 1})
    assert all(answer.count("[SEG]") == 1 for row in few for answer in answers(row))


def test_a_name_with_a_speck_that_holds_no_pixel_is_not_asked_for(scenes, tmp_path):
    """COCO's train split has a few; their polygons lie between the pixels."""
    document = write_instances(tmp_path, scenes)
    one = next(item for item in document["annotations"] if item["image_id"] == 1)
    speck = {"segmentation": [[3.6, 3.6, 4.2, 3.6, 4.2, 4.2, 3.6, 4.2]], "bbox": [3.6, 3.6, 0.6, 0.6]}
    document["annotations"].append(one | speck | {"id": 9999, "category_id": 3})
    document["annotations"][-1]["category_id"] = 3
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(document))
    first = load({"coco_instances": str(tmp_path), "absent": 5})[0]
    assert questions(first) and not any("zebra" in question for question in questions(first))
    loaded(first)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("images", r"annotations speak of 1 pictures that it does not list: \[1\]"),
        ("categories", r"annotations are of 1 categories that it does not name: \[1\]"),
    ],
)
def test_annotations_of_what_is_not_listed(key, message, scenes, tmp_path):
    document = write_instances(tmp_path, scenes)
    document[key] = [item for item in document[key] if item["id"] != 1]
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        load({"coco_instances": str(tmp_path)})


# --- ADE20K ---


def write_ade(folder, scenes) -> list[np.ndarray]:
    """ADEChallengeData2016; the labels of each picture are its objects' numbers, 0 = background."""
    for kind in ("images", "annotations"):
        (folder / kind / "training").mkdir(parents=True)
    rows = [f"{n}\t0.1\t10\t2\tname{n}, other name{n}" for n in range(1, 151)]
    table = "\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n"
    (folder / "objectInfo150.txt").write_text(table, encoding="utf-8-sig")
    labels = [scene.instances.astype(np.uint8) for scene in scenes]
    for number, (scene, label) in enumerate(zip(scenes, labels, strict=True), 1):
        Image.fromarray(scene.image).save(folder / "images" / "training" / f"ADE_train_{number:08d}.jpg")
        Image.fromarray(label).save(folder / "annotations" / "training" / f"ADE_train_{number:08d}.png")
    return labels


def test_several_names_in_one_answer(scenes, tmp_path):
    labels = write_ade(tmp_path, scenes)
    dataset = load({"ade20k": str(tmp_path), "names": 2, "least": 0})
    for row, label in zip(dataset, labels, strict=True):
        masks = iter(loaded(row).masks)
        said = " ".join(answers(row)).replace(",", "").replace(".", "").split(" [SEG]")[:-1]
        assert sorted(words.strip() for words in said) == sorted(f"name{n}" for n in np.unique(label) if n)
        for words in said:
            assert (next(masks) == (label == int(words.strip()[4:]))).all()
        assert all(1 <= answer.count("[SEG]") <= 2 for answer in answers(row))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "annotations" / "training" / "ADE_train_00000002.png").unlink(),
            "lacks the label pictures of 1 pictures: ADE_train_00000002",
        ),
        (
            lambda folder: (folder / "images" / "training" / "ADE_train_00000002.jpg").unlink(),
            r"1 pictures are missing, .*ADE_train_00000002\.jpg",
        ),
        (lambda folder: (folder / "objectInfo150.txt").write_text("a\tb\n1\t2\n"), "no table with the columns Idx"),
        (
            lambda folder: Image.new("L", (9, 9), 151).save(
                folder / "annotations" / "training" / "ADE_train_00000001.png"
            ),
            r"ADE_train_00000001\.png holds uint8 of shape \(9, 9\) up to 151; expected one number a pixel, 0 to 150",
        ),
    ],
)
def test_what_does_not_belong_together_is_named(spoil, message, scenes, tmp_path):
    write_ade(tmp_path, scenes)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        load({"ade20k": str(tmp_path)})


# --- LLaVA and the Hub ---


def write_llava(folder, conversations: list[dict]) -> None:
    (folder / "coco").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10)).save(folder / "coco" / "1.jpg")
    (folder / "llava.json").write_text(json.dumps(conversations))


def turn(question: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "A ball."}]


def test_llava_samples_that_cannot_be_are_counted_and_named(tmp_path):
    good = [
        {"id": "a", "image": "coco/1.jpg", "conversations": turn("<image>\nWhat is it?")},
        {"id": "words", "conversations": turn("Hello?")},
        {"id": "first", "image": "coco/1.jpg", "conversations": turn("What is it?")},
    ]
    three = {"id": "three", "image": "coco/1.jpg", "conversations": turn("<image> <image> <image> What are these?")}
    gone = {"id": "gone", "image": "coco/2.jpg", "conversations": turn("<image>\nWhat is it?")}
    write_llava(tmp_path, [*good, three])
    with pytest.raises(ValueError, match=r"1 of 4 samples show another number .*: three shows 3 and has 1"):
        load({"llava": str(tmp_path / "llava.json")})
    write_llava(tmp_path, [*good, gone])
    with pytest.raises(ValueError, match=r"1 pictures are missing, of 1 of 4 samples: .*2\.jpg"):
        load({"llava": str(tmp_path / "llava.json")})
    for name in ("", "coco"):  # no name, and a folder's
        write_llava(tmp_path, [*good, gone | {"image": name}])
        with pytest.raises(ValueError, match="1 pictures are missing, of 1 of 4 samples"):
            load({"llava": str(tmp_path / "llava.json")})
    write_llava(tmp_path, [three, *good, gone])
    kept = load({"llava": str(tmp_path / "llava.json"), "missing": "skip"})
    assert kept["id"][:] == ["a", "words", "first"]
    for row in kept:
        check_sample(row)


def test_a_data_set_of_the_hub_s_library(scenes, tmp_path):
    from evaluation.published_formats import png

    rows = [
        {
            "picture": [{"bytes": png(scene.image), "path": None}],
            "chat": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": f"Number {number}."}],
            "note": "x",
        }
        for number, scene in enumerate(scenes)
    ]
    write_parquet(tmp_path / "set", rows, "train")
    renamed = {"images": "picture", "messages": "chat"}
    dataset = load({"hub": str(tmp_path / "set"), "columns": renamed})
    assert [answers(row) for row in dataset] == [[f"Number {n}."] for n in range(len(scenes))]
    assert loaded(dataset[1]).pictures[0].size == (SIZE, SIZE)
    stream = load({"hub": str(tmp_path / "set"), "columns": renamed, "streaming": True})
    assert answers(next(iter(stream))) == ["Number 0."]
    dataset.save_to_disk(str(tmp_path / "saved"))
    assert list(load({"hub": str(tmp_path / "saved")})) == list(dataset)
    with pytest.raises(ValueError, match=r"saved \(split 'validation'\) cannot be had: it is the split 'train'"):
        load({"hub": str(tmp_path / "saved"), "split": "validation"})
    with pytest.raises(ValueError, match=r"has no column 'photo'; it has picture, chat, note"):
        load({"hub": str(tmp_path / "set"), "columns": {"images": "photo"}})
    with pytest.raises(ValueError, match="has the columns picture, chat, note; a sample needs `messages`"):
        load({"hub": str(tmp_path / "set")})
    with pytest.raises(ValueError, match=r"set \(split 'test'\) cannot be had: "):
        load({"hub": str(tmp_path / "set"), "split": "test"})


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_that_a_folder_of_lines_names_lie_in_it(tmp_path, monkeypatch, streaming):
    """Not in the working folder, where a file of the same name may be."""
    rows = []
    for number in range(3):
        (tmp_path / "data" / "im").mkdir(parents=True, exist_ok=True)
        picture(seed=number).save(tmp_path / "data" / "im" / f"{number}.png")
        talk = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A ball."}]
        rows.append({"images": [f"im/{number}.png"], "messages": talk})
    (tmp_path / "data" / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "im").mkdir()
    picture(seed=9).save(tmp_path / "im" / "0.png")
    monkeypatch.chdir(tmp_path)
    dataset = load({"hub": str(tmp_path / "data"), "streaming": streaming})
    names = [row["images"][0]["path"] for row in dataset]
    assert names == [str(tmp_path / "data" / "im" / f"{number}.png") for number in range(3)]
    others = [{"pics": row["images"], "chat": row["messages"]} for row in rows]
    others.insert(0, {"pics": [], "chat": rows[0]["messages"]})  # words alone, and other names of columns
    (tmp_path / "data" / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    columns = {"images": "pics", "messages": "chat"}
    dataset = load({"hub": str(tmp_path / "data"), "streaming": streaming, "columns": columns})
    assert [picture["path"] for row in dataset for picture in row["images"] or []] == names


def test_pictures_of_the_hub_s_library_are_looked_for_too(tmp_path):
    chat = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A ball."}]
    Image.new("RGB", (20, 10)).save(tmp_path / "1.png")
    rows = [{"id": name, "images": [str(tmp_path / name)] * 2, "messages": chat} for name in ("1.png", "2.png")]
    rows.append(rows[0] | {"images": rows[0]["images"][:1]})
    import_datasets().Dataset.from_list(rows).save_to_disk(tmp_path / "a")
    task = {"hub": str(tmp_path / "a")}
    with pytest.raises(ValueError, match=r"1 pictures are missing, of 1 of 3 samples: .*2\.png"):
        load(task)
    (tmp_path / "2.png").symlink_to("1.png")
    with pytest.raises(ValueError, match=r"2 of 3 samples show another number .*: 1\.png shows 1 and has 2"):
        load(task)
    assert len(load(task | {"missing": "skip"})) == 1


def test_looking_for_pictures_reads_none_of_them():
    """Not those either that a data set holds itself: a set of tar shards would be read whole at every start."""
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A ball."}]
    rows = dataset_of([{"images": [bytes(10_000_000)], "messages": chat}])
    tracemalloc.start()
    with_pictures(rows, Path("here"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"refcoco": "nowhere"}, r"There is no refs\(unc\)\.p; looked for nowhere"),
        ({"coco_instances": "nowhere"}, r"There is no instances_train2017\.json; looked for nowhere"),
        ({"ade20k": "nowhere"}, r"There is no objectInfo150\.txt"),
        ({"labels": "nowhere"}, r"nowhere holds no labels \(labels\.json is missing\)"),
        ({"refcoco": "nowhere", "turns": 0}, "turns is 0"),
        ({"refcoco": "nowhere", "mising": "skip"}, "unknown key 'mising'; did you mean missing"),
        ({"coco_instances": "nowhere", "most_masks": 0}, "most_masks is 0"),
        ({"ade20k": "nowhere", "names": 0}, "names is 0"),
        ({"hub": "nowhere/at-all"}, r"nowhere/at-all \(split 'train'\) cannot be had"),
        ({"hub": "nowhere/at-all", "missing": "Skip"}, "missing is 'Skip'; choose one of raise, skip"),
        ({"hub": "nowhere/at-all", "missing": "skip", "streaming": True}, "nothing is looked for in a stream"),
        ({"llava": "nowhere", "missing": "skip", "streaming": True}, "nothing is looked for in a stream"),
        ({"hub": str(Path(__file__).parent), "revision": "main"}, "revision is 'main', but the data set is a folder"),
    ],
)
def test_sources_that_are_not_there(task, message):
    with pytest.raises(ValueError, match=message):
        load_tasks([task])
