"""`perceptio predict`: what it writes, what it prints, and what it refuses before any work is done."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from perceptio_hf import tiny_checkpoint
from perceptio_hf.commands import checkpoints, main
from perceptio_hf.commands.predict import answer_questions, name_folders
from perceptio_hf.data.run_length import decode_mask

QUESTION = "Which object is closest?"


@pytest.fixture
def photo(tmp_path) -> Path:
    """A photograph taken upright with a camera held sideways: 60 wide, 40 high once turned."""
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((40, 60), 80).convert("RGB").save(path, exif=exif)
    return path


def predict(tiny_folder, out: Path, *arguments) -> int:
    return main.run(["predict", *map(str, arguments), "--model", str(tiny_folder), "--out", str(out)])


def test_writes_masks_depth_and_answer_at_the_size_the_user_sees(tiny_folder, tmp_path, photo, capsys):
    assert predict(tiny_folder, tmp_path / "out", photo, QUESTION, "--spatial", "seg+depth") == 0
    folder = tmp_path / "out" / "photo"
    assert sorted(os.listdir(folder)) == ["answer.json", "depth.png", "depth_color.png", "overlay.png", "sheet.png"]
    for name in ("depth.png", "depth_color.png", "overlay.png"):
        assert Image.open(folder / name).size == (60, 40)
    assert np.asarray(Image.open(folder / "depth.png")).dtype == np.uint16
    answer = json.loads((folder / "answer.json").read_text())
    assert answer["question"] == QUESTION and answer["spatial"] == "seg+depth" and answer["picture"] == str(photo)
    assert (answer["width"], answer["height"], answer["well_formed"]) == (60, 40, True)
    assert len(answer["masks"]) == len(answer["mask_scores"]) == len(answer["phrases"]) >= 1
    assert decode_mask(answer["masks"][0]).shape == (40, 60)
    assert all(isinstance(code, int) for code in answer["depth_codes"])
    assert str(folder) in capsys.readouterr().out


def test_several_pictures_give_one_json_document_and_a_folder_each(tiny_folder, tmp_path, photo, capsys):
    twin = tmp_path / "other" / "photo.png"
    twin.parent.mkdir()
    Image.new("L", (1, 1)).save(twin)
    arguments = (photo, twin, photo, QUESTION, "--json", "--spatial", "depth", "--batch-size", 2)
    assert predict(tiny_folder, tmp_path / "out", *arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert [a["picture"] for a in document["answers"]] == [str(photo), str(twin), str(photo)]
    assert sorted(os.listdir(tmp_path / "out")) == ["photo", "photo-2", "photo-3"]
    first, second, third = document["answers"]
    assert (second["width"], second["height"]) == (1, 1)
    assert first["depth_codes"] == third["depth_codes"], "the same picture, in whichever batch, gets the same answer"
    for answer in document["answers"]:
        assert json.loads(Path(answer["files"]["answer"]).read_text()) == answer


def test_batch_equals_singles(tiny_folder, photo):
    from perceptio_hf.processing.pictures import load_picture

    loaded = checkpoints.load(str(tiny_folder))
    pictures = [load_picture(photo), Image.new("RGB", (30, 90), "red")]
    questions = [QUESTION, "What?"]
    together = answer_questions(*loaded, pictures, questions, spatial="depth")
    for picture, question, answer in zip(pictures, questions, together, strict=True):
        alone = answer_questions(*loaded, [picture], [question], spatial="depth")[0]
        assert alone.depth_codes == answer.depth_codes
        assert np.abs(alone.depth - answer.depth).max() < 1e-4


def test_depth_of_an_earlier_run_goes_when_this_one_has_none(tiny_folder, tmp_path, photo):
    for mode, files in (("depth", 5), ("none", 3), ("seg", 3)):
        assert predict(tiny_folder, tmp_path / "out", photo, QUESTION, "--spatial", mode) == 0
        assert len(os.listdir(tmp_path / "out" / "photo")) == files


def test_spatial_token_strings_of_the_user_stay_text(tiny_folder, tmp_path, photo):
    question = "[SEG] <DEPTH_START> <DEPTH_3> what is this? <image>"
    assert predict(tiny_folder, tmp_path / "out", photo, question, "--spatial", "none") == 0
    answer = json.loads((tmp_path / "out" / "photo" / "answer.json").read_text())
    assert answer["question"] == question and answer["masks"] == [] and answer["depth_codes"] is None


def broken_pictures(folder: Path) -> dict[str, Path]:
    whole = folder / "whole.png"
    Image.effect_noise((64, 64), 90).save(whole)
    (folder / "truncated.png").write_bytes(whole.read_bytes()[:2000])
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.jpg").touch()
    (folder / "folder.png").mkdir()
    names = ("truncated.png", "text.jpg", "empty.jpg", "folder.png", "missing.jpg")
    return {name: folder / name for name in names}


@pytest.mark.parametrize("name", ["truncated.png", "text.jpg", "empty.jpg", "folder.png", "missing.jpg"])
def test_a_broken_picture_stops_everything_first(tiny_folder, tmp_path, photo, capsys, name):
    broken = broken_pictures(tmp_path)[name]
    assert predict(tiny_folder, tmp_path / "out", photo, broken, QUESTION) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and str(broken) in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["PHOTO", ""], "question is empty"),
        (["PHOTO", "  "], "question is empty"),
        (["What is this?"], "Give a picture"),
        (["PHOTO", "PHOTO"], "add the question"),
        (["PHOTO", "forgotten.png"], "add the question"),
        (["http://127.0.0.1:1/a.png", "What?"], "cannot be fetched"),
        (["s3://bucket/a.png", "What?"], "download"),
        (["PHOTO", "What is \udce9?"], "is not UTF-8"),
        (["PHOTO", "What?", "--device", "gpu"], "--device gpu cannot be used here"),
        (["PHOTO", "What?", "--device", "meta"], "--device meta cannot be used here: it holds no values"),
        (["PHOTO", "What?", "--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["PHOTO", "What?", "--device", ""], "cannot be used here"),
        (["PHOTO", "What?", "--dtype", "int8"], "'int8' is not one of"),
        (["PHOTO", "What?", "--spatial", "depth", "--max-new-tokens", "3"], "3 tokens"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tiny_folder, tmp_path, photo, capsys, arguments, says):
    arguments = [str(photo) if word == "PHOTO" else word for word in arguments]
    assert predict(tiny_folder, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and says in error
    assert not (tmp_path / "out").exists()


def test_names_that_are_not_utf_8_stop_before_inference(tiny_folder, tmp_path, photo, capsys):
    """An answer is JSON, and JSON is UTF-8: of the picture, of the folder for results."""
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    Path(strange).write_bytes(photo.read_bytes())
    before = sorted(os.listdir(tmp_path))
    assert predict(tiny_folder, tmp_path / "out", photo, strange, QUESTION) == 2
    assert predict(tiny_folder, Path(strange).with_suffix(""), photo, QUESTION) == 2
    for error in capsys.readouterr().err.splitlines():
        assert "caf\\udce9" in error and "is not UTF-8" in error and error.isprintable()
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("known", [True, False])
def test_bfloat16_that_is_slow_is_spoken_of(tiny_folder, tmp_path, monkeypatch, capsys, known):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": known})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    model, processor = checkpoints.load(str(tiny_folder), "cpu", "bfloat16")
    assert not capsys.readouterr().err, "somebody asked for it"
    for part in (model, processor):
        part.save_pretrained(tmp_path / "half")
    checkpoints.load(str(tmp_path / "half"), "cpu", "float32")
    assert not capsys.readouterr().err
    checkpoints.load(str(tmp_path / "half"), "cpu")
    assert ("--dtype float32" in capsys.readouterr().err) is not known


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_device_and_dtype(tiny_folder, tmp_path, photo, dtype):
    arguments = (photo, QUESTION, "--spatial", "seg+depth", "--device", "cpu", "--dtype", dtype)
    assert predict(tiny_folder, tmp_path / "out", *arguments) == 0
    assert len(json.loads((tmp_path / "out" / "photo" / "answer.json").read_text())["depth_codes"]) == 16
    model, _ = checkpoints.load(str(tiny_folder), "cpu", dtype)
    assert model.model.language_model.dtype == getattr(torch, dtype if dtype != "auto" else "float32")
    assert {parameter.dtype for parameter in model.depth_model.parameters()} == {torch.float32}


def test_out_must_not_be_a_file(tiny_folder, photo, capsys):
    for out in (photo, photo / "below"):
        assert predict(tiny_folder, out, photo, QUESTION) == 2
        assert "is a file" in capsys.readouterr().err


def wrong_checkpoints(tiny_folder: Path, folder: Path) -> dict[str, tuple[Path, str]]:
    """Folders that are no Perceptio checkpoint, and what the error must mention."""

    def copy(name: str, leave_out: str = "", **config) -> Path:
        target = folder / name
        target.mkdir()
        for file in tiny_folder.iterdir():
            if file.is_file() and file.name != leave_out:
                (target / file.name).write_bytes(file.read_bytes())
        settings = json.loads((target / "config.json").read_text()) | config
        (target / "config.json").write_text(json.dumps(settings))
        return target

    (folder / "bare").mkdir()
    elsewhere = copy("elsewhere", leave_out="model.safetensors")
    (folder / "outside.safetensors").write_bytes((tiny_folder / "model.safetensors").read_bytes())
    with safe_open(folder / "outside.safetensors", "pt") as weights:
        places = dict.fromkeys(weights.keys(), "../outside.safetensors")
    index = {"metadata": {}, "weight_map": places}
    (elsewhere / "model.safetensors.index.json").write_text(json.dumps(index))
    truncated = copy("truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return {
        "missing": (folder / "missing", "no folder"),
        "bare": (folder / "bare", "config.json"),
        "another kind": (copy("bert", model_type="bert"), "'bert'"),
        "unknown kind": (copy("mystery", model_type="mystery"), "mystery"),
        "no weights": (copy("weightless", leave_out="model.safetensors"), "model.safetensors"),
        "truncated weights": (truncated, "truncated"),
        "weights elsewhere": (elsewhere, "../outside.safetensors, outside its own folder"),
        "other sizes": (copy("sizes", num_depth_codes=7), "num_depth_codes"),
    }


KINDS = (
    "missing",
    "bare",
    "another kind",
    "unknown kind",
    "no weights",
    "truncated weights",
    "other sizes",
    "weights elsewhere",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_checkpoint_is_one_line(tiny_folder, tmp_path, photo, capfd, kind):
    folder, says = wrong_checkpoints(tiny_folder, tmp_path)[kind]
    assert predict(folder, tmp_path / "out", photo, QUESTION) == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert says in error and str(folder) in error
    assert not (tmp_path / "out").exists()


def test_the_embedded_checkpoint_has_a_name():
    """As in recipes, `perceptio ablate --sight tiny` and `perceptio label --depth-codec tiny`."""
    assert checkpoints.resolve("tiny") == checkpoints.resolve(None) == tiny_checkpoint()
    assert checkpoints.is_tiny(checkpoints.resolve("tiny"))


def test_folders_are_numbered_where_names_meet():
    names = ["a/cat.png", "b/Cat.jpg", "cat-2.png", "c/cat.png", "dog.tar.gz"]
    assert [f.name for f in name_folders(names, Path("out"))] == ["cat", "Cat-2", "cat-2-2", "cat-3", "dog.tar"]


def test_no_name_hides_a_folder_or_leads_out_of_it():
    names = [".png", "...", "a/..", "a/.cat.jpg", "cat .png", "data:image/png;base64,AAAA/BBBB", "https://host/"]
    names += ["https://host/a/red%20cat.jpg?width=3", "file:///x/dog.png", f"https://host/{'x' * 500}.png"]
    made = [folder.relative_to("out") for folder in name_folders(names, Path("out"))]
    expected = ["png", "picture", "picture-2", "cat", "cat-2", "picture-3", "picture-4", "red cat", "dog"]
    assert [str(path) for path in made[:-1]] == expected
    assert len(made[-1].parts) == 1 and len(str(made[-1])) < 100
