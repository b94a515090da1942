"""`perceptio export`: the folder it writes, what it prints, and what it refuses."""

import json
import shutil

import pytest
from transformers import InternVLForConditionalGeneration

from perceptio_hf.commands import main


def export(*arguments) -> int:
    return main.run(["export", *map(str, arguments)])


def test_writes_a_stock_folder(tiny_folder, tmp_path, capsys):
    out = tmp_path / "new" / "internvl"
    assert export(tiny_folder, out, "--format", "internvl", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["files"] == sorted(path.name for path in out.iterdir())
    assert document["model"] == str(tiny_folder) and document["format"] == "internvl"
    _, info = InternVLForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())


def test_replaces_only_when_told_and_never_before_it_is_complete(tiny_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert export(tiny_folder, out) == 0
    (out / "old").touch()
    assert export(tiny_folder, out) == 2 and "--overwrite" in capsys.readouterr().err
    assert export(tmp_path / "absent" / "x", out, "--overwrite") == 2 and (out / "old").exists()
    assert export(tiny_folder, out, "--overwrite") == 0 and not (out / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_checkpoint_itself_is_never_replaced(tiny_folder, tmp_path, capsys, monkeypatch):
    saved = shutil.copytree(tiny_folder, tmp_path / "saved")
    assert export(saved, saved, "--overwrite", "--no-verify") == 2
    assert "saved is to be read; name another folder" in capsys.readouterr().err
    assert json.loads((saved / "config.json").read_text())["model_type"] == "perceptio"
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(saved)}))
    assert export(tmp_path / "adapter", saved, "--overwrite", "--no-verify") == 2  # nor what an adapter needs
    assert "saved is to be read; name another folder" in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(tmp_path))
    assert export("~/saved", "~/saved", "--overwrite") == 2
    assert export("~/saved", "~/out", "--no-verify") == 0 and (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("arguments", [("--format", "onnx"), ("--bogus",)])
def test_mistakes_are_one_line(tiny_folder, tmp_path, capsys, arguments):
    assert export(tiny_folder, tmp_path / "out", *arguments) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and captured.out == "" and not (tmp_path / "out").exists()


def test_another_kind_of_model_is_refused(tiny_folder, tmp_path, capsys):
    assert export(tiny_folder, tmp_path / "stock") == 0
    assert export(tmp_path / "stock", tmp_path / "again") == 2
    assert "internvl" in capsys.readouterr().err and not (tmp_path / "again").exists()


def test_grammars_for_several_pictures_and_code_on_demand(tiny_folder, tmp_path, capsys):
    assert export(tiny_folder, tmp_path / "plain") == 0
    assert export(tiny_folder, tmp_path / "more", "--pictures", 2, "--tokens-before-span", 9, "--with-code") == 0
    plain, more = ({path.name for path in (tmp_path / name).iterdir()} for name in ("plain", "more"))
    assert "grammars" in plain and "processing_perceptio.py" in more - plain
    assert all(name.endswith(".py") for name in more - plain)
    assert not (tmp_path / "plain" / "grammars" / "2-pictures").exists()
    assert "(free{0,9} span){0,2}" in (tmp_path / "more" / "grammars" / "2-pictures" / "auto.lark").read_text()
    capsys.readouterr()
    assert export(tiny_folder, tmp_path / "none", "--pictures", 0) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "none").exists()
