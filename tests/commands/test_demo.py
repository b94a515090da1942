"""`perceptio demo`: a held-out scene, every file it names, the truth beside the answer."""

import json
import os

import numpy as np
from PIL import Image

from perceptio_hf.commands import main
from perceptio_hf.commands.demo import SHOWN, choose_scene
from perceptio_hf.evaluation.run import answering
from perceptio_hf.world import DEMO_SEED


def test_scenes_are_held_out_and_the_same_every_time():
    scene, refer, closest = choose_scene(3)
    again = choose_scene(3)
    assert scene.seed >= DEMO_SEED
    assert np.array_equal(scene.image, again[0].image)
    assert (refer, closest) == again[1:]
    assert closest.kind == "closest_point" and closest.answer in closest.letters
    assert refer.targets and scene.mask(refer.targets[0]).any()
    assert choose_scene(4)[0].seed != scene.seed


def test_demo_writes_what_it_says(tiny_folder, tmp_path, capsys):
    out = tmp_path / "demo"
    assert main.run(["demo", "--model", str(tiny_folder), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    names = ["answer.json", "depth.png", "depth_color.png", "marked.png", "overlay.png", "picture.png", "sheet.png"]
    assert sorted(os.listdir(out)) == names
    picture = Image.open(out / "picture.png")
    assert picture.size == (SHOWN, SHOWN)
    for name in ("marked.png", "depth.png", "depth_color.png", "overlay.png"):
        assert Image.open(out / name).size == picture.size
    answer = json.loads((out / "answer.json").read_text())
    for key in ("question", "truth", "second_question", "second_truth"):
        assert answer[key] in printed
    assert str(out / "sheet.png") in printed
    assert 0 <= answer["mask_iou"] <= 1 and 0 <= answer["depth_error"] <= 1


def test_json_is_one_document(tiny_folder, tmp_path, capsys):
    arguments = ["demo", "--model", str(tiny_folder), "--out", str(tmp_path), "--json", "--seed", "1"]
    assert main.run(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "answer.json").read_text())


def test_out_must_not_be_a_file(tiny_folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main.run(["demo", "--model", str(tiny_folder), "--out", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_the_model_sees_its_own_size_and_people_a_sharper_picture(tiny_folder, tmp_path, monkeypatch):
    seen, encode = [], answering.encode_questions

    def encode_noted(processor, pictures, questions):
        seen.extend(picture.size for picture in pictures)
        return encode(processor, pictures, questions)

    monkeypatch.setattr(answering, "encode_questions", encode_noted)
    assert main.run(["demo", "--model", str(tiny_folder), "--out", str(tmp_path)]) == 0
    assert seen == [(128, 128)] * 2
    with Image.open(tmp_path / "marked.png") as marked:
        assert marked.size == (SHOWN, SHOWN)
