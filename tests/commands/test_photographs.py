"""The command on real photographs and sensor frames, with the embedded checkpoint."""

import json

from PIL import Image

from perceptio_hf.commands import main


def test_predict_on_photographs(shared, tmp_path, capsys):
    pictures = [
        shared / "hardblink" / "images" / "blink3pointscenter" / "0.png",
        shared / "rgbd" / "frame-000000.color.jpg",
    ]
    arguments = [*map(str, pictures), "Which point is the closest to the camera?", "--spatial", "seg+depth"]
    assert main.run(["predict", *arguments, "--out", str(tmp_path), "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    for path, answer in zip(pictures, answers, strict=True):
        assert "rendered scenes" in answer["note"] and answer["well_formed"] and answer["masks"]
        with Image.open(path) as picture, Image.open(answer["files"]["depth"]) as depth:
            assert depth.size == picture.size
