"""Questions from labelled depth: true, drawn where they say, and without shortcuts; objects in COCO's form."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perceptio_hf.data.depth_maps import depth_picture, relative_from_metric
from perceptio_hf.data.run_length import decode_mask, encode_mask
from perceptio_hf.data.samples import check_sample
from perceptio_hf.data.sources import load_samples
from perceptio_hf.files import write_json
from perceptio_hf.labelling import fair_points, objects
from perceptio_hf.labelling.fair_points import CELLS, draw_questions, read_cells
from perceptio_hf.labelling.labels import ABOUT_FILE, ROWS_FOLDER
from perceptio_hf.labelling.objects import Annotations, Thing, balanced, pairs_of
from perceptio_hf.labelling.questions import write_questions
from perceptio_hf.labelling.shards import label_features, write_dataset
from perceptio_hf.labelling.worker import map_name
from perceptio_hf.world import render_scene
from perceptio_hf.world.scene import ATTRIBUTES

SCENES, SIZE = range(150), 64


@pytest.fixture(scope="module")
def scenes():
    return [render_scene(seed, size=SIZE) for seed in SCENES]


@pytest.fixture(scope="module")
def labelled(scenes, tmp_path_factory) -> Path:
    """Rendered scenes as if a perfect teacher had labelled them, and their objects in COCO's form."""
    folder, annotations = tmp_path_factory.mktemp("world"), []
    rows = []
    for number, scene in enumerate(scenes):
        path = folder / f"{number:04d}.png"
        Image.fromarray(scene.image).save(path)
        kept = folder / map_name(number)
        kept.parent.mkdir(parents=True, exist_ok=True)
        depth_picture(relative_from_metric(scene.depth)).save(kept)
        image = {"bytes": None, "path": str(path)}
        row = {
            "id": path.name,
            "image": image,
            "width": SIZE,
            "height": SIZE,
            "codes": [number % 16] * 16,
            "extra": None,
        }
        rows.append(row | {"depth": map_name(number)})
        for index, thing in enumerate(scene.objects, start=1):
            mask = encode_mask(scene.mask(index))
            category = ATTRIBUTES["shape"].index(thing.shape)
            annotations.append({"image_id": number, "category_id": category, "segmentation": mask, "iscrowd": 0})
    about = {"format": "perceptio labels", "version": 1, "complete": True, "maps": True, "rows": len(rows)}
    write_dataset(folder / ROWS_FOLDER, rows, label_features(), about)
    write_json(folder / ABOUT_FILE, about)
    names = [{"id": number, "name": name} for number, name in enumerate(ATTRIBUTES["shape"])]
    images = [{"id": n, "file_name": f"{n:04d}.png", "width": SIZE, "height": SIZE} for n in range(len(scenes) + 3)]
    document = {"images": images, "annotations": annotations, "categories": names}
    (folder / "instances.json").write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def asked(labelled):
    """The report, and the samples."""
    report = write_questions(labelled, ("closest", "order", "objects"), Annotations(labelled / "instances.json"))
    return report, load_samples(labelled / "questions")


def test_samples_can_be_learnt_and_answers_are_true(asked, labelled, scenes):
    report, samples = asked
    assert {kind: found["questions"] for kind, found in report["kinds"].items()} == {
        kind: samples["task"].count(kind) for kind in ("closest", "order", "objects")
    }
    assert min(found["questions"] for found in report["kinds"].values()) > 0
    assert json.loads((labelled / "questions.json").read_text()) == report
    for sample in samples:
        check_sample(sample, num_depth_tokens=16, num_depth_codes=16)
        number = int(sample["id"][:4])
        assert sample["depth_codes"] == [[number % 16] * 16]
        said = "".join(part["text"] for part in sample["messages"][1]["content"])
        if sample["task"] == "objects":
            masks = [decode_mask(mask) for mask in sample["masks"]]
            depths = [np.median(scenes[number].depth[mask]) for mask in masks]
            named = sample["messages"][0]["content"][-1]["text"]
            nearer = said.removeprefix("[SEG][SEG]<DEPTH_START><DEPTH_END>The ").removesuffix(".")
            shapes = [shape_under(scenes[number], mask) for mask in masks]
            assert shapes.index(nearer) == int(np.argmin(depths)) and named.index(shapes[0]) < named.index(shapes[1])
        else:
            assert said.startswith("<DEPTH_START><DEPTH_END>")
            picture = np.asarray(Image.open(io.BytesIO(sample["images"][0]["bytes"]))).astype(int)
            red = (picture[..., 0] > 170) & (picture[..., 1] < 110) & (picture[..., 2] < 110)
            assert picture.shape == (SIZE, SIZE, 3) and red.sum() > 20


def shape_under(scene, mask: np.ndarray) -> str:
    """The shape of the object that a mask is of."""
    return next(thing.shape for index, thing in enumerate(scene.objects, 1) if scene.mask(index)[mask].all())


def test_points_answer_as_the_map_says(labelled, scenes):
    relative = [relative_from_metric(scene.depth) for scene in scenes]
    readings = np.stack([read_cells(item) for item in relative])
    for kind in ("closest", "order"):
        for question in draw_questions(readings, kind, np.random.default_rng(3)):
            points = question.points(SIZE, SIZE)
            nearness = {
                letter: relative[question.picture][y, x]
                for letter, (x, y) in zip(question.letters, points, strict=True)
            }
            ranked = sorted(nearness, key=nearness.get, reverse=True)
            assert tuple(ranked[: len(question.answer)]) == question.answer


@pytest.mark.parametrize("kind", ["closest", "order"])
def test_points_have_no_shortcuts(kind):
    """Where near things stand low, as in photographs: without fair sets the lowest would be right in two of three."""
    rng = np.random.default_rng(0)
    rows = np.repeat(np.arange(8), 8)
    readings = (rows / 8 + rng.normal(0, 0.12, (4000, CELLS))).astype(np.float32)
    readings[rng.random(readings.shape) < 0.2] = np.nan
    questions = list(draw_questions(readings, kind, rng))
    assert len(questions) > 200
    assert len({question.picture for question in questions}) == len(questions)
    chance, rules = fair_points.rule_shares(questions)
    assert {"lowest", "highest", "most_central", "most_frequent_answer"} == set(rules)
    assert all(abs(share - chance) < 1e-9 for share in rules.values()), rules
    below = readings[:, [20, 28, 36]]  # in neighbouring rows, as those that are asked about
    below = below[~np.isnan(below).any(1)]
    assert (below.argmax(1) == 2).mean() > 0.6


def test_pairs_have_no_shortcuts():
    """Dogs are mostly nearer than cars, lower and larger here; such rules are right in half of what is asked."""
    rng = np.random.default_rng(0)
    pairs = []
    for picture in range(600):
        relative = np.linspace(0, 1, 64)[:, None].repeat(64, 1) + rng.normal(0, 0.25)
        things = []
        for name in ("car", "dog"):
            mask = np.zeros((64, 64), bool)
            top = int(rng.integers(20, 40)) if name == "dog" else int(rng.integers(4, 34))
            mask[top : top + int(rng.integers(8, 20)), 4:40] = True
            things.append(Thing(name, encode_mask(mask)))
            relative[mask] += rng.normal(0.1 if name == "dog" else 0, 0.3)
        pairs += pairs_of(picture, things, relative, (64, 64))
    before = np.mean([pair.looks[2] == (pair.answer == 0) for pair in pairs])
    asked = balanced(pairs, rng)
    chance, rules = objects.rule_shares(asked)
    assert before > 0.6 and len(asked) > 100 and chance == 0.5
    assert rules == {"lower": 0.5, "larger": 0.5, "first_named": 0.5, "category": 0.5}
    assert all((pair.first.name, pair.second.name)[pair.answer] in ("car", "dog") for pair in asked)


def test_what_has_no_counterpart_is_counted(asked, labelled, tmp_path):
    assert asked[0]["annotations"] == {
        "pictures_without_annotations": 0,
        "annotated_pictures_not_labelled": 3,
        "pictures_of_another_size_than_annotated": 0,
    }
    document = json.loads((labelled / "instances.json").read_text())
    annotations = Annotations(labelled / "instances.json")
    assert annotations.of(["0003.png"], (60, 64)) == [] and len(annotations.other_size) == 1
    assert annotations.of(["else.png"], (64, 64)) == [] and len(annotations.without) == 1
    assert annotations.of(["x/y/0003.png"], (SIZE, SIZE)) == annotations.of(["0003.png"], (SIZE, SIZE))
    for image in document["images"]:
        image["file_name"] = "other" + image["file_name"]
    (tmp_path / "a.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="about none of these pictures"):
        write_questions(labelled, ("objects",), Annotations(tmp_path / "a.json"))
    assert len(load_samples(labelled / "questions")) == len(asked[1]), "the old questions stay"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[", "is not JSON"),
        ("[]", "not of COCO's form"),
        ('{"images": [{}], "annotations": [], "categories": []}', "file_name"),
    ],
)
def test_files_of_another_form(tmp_path, text, says):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        Annotations(tmp_path / "a.json")


def test_labels_without_maps_have_no_questions(labelled, tmp_path):
    about = json.loads((labelled / ABOUT_FILE).read_text()) | {"maps": False}
    write_json(tmp_path / ABOUT_FILE, about)
    with pytest.raises(ValueError, match="label with --maps"):
        write_questions(tmp_path, ("closest",))


def test_rough_places_and_small_pictures_are_not_asked_about():
    smooth = np.full((64, 64), 0.5, np.float32)
    smooth[:, 32:] = 0.9
    reading = read_cells(smooth)
    assert reading[0] == 0.5 and reading[7] == np.float32(0.9) and not np.isnan(reading).any()
    smooth[28, 28] = 0.2  # the middle of cell 27
    assert np.isnan(read_cells(smooth)[27])
    assert np.isnan(read_cells(np.zeros((20, 20), np.float32))).all()
