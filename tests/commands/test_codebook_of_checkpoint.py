"""`perceptio codebook` takes the codec out of a whole checkpoint too."""

import json

import pytest

from perceptio_hf.commands import main


def test_eval_of_a_checkpoint_s_codec(tiny_folder, capsys):
    assert main.run(["codebook", "eval", str(tiny_folder), "--maps", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["maps"] == 3


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("data: 5", "data must be a text"),
        ("steps: many", "steps must be a whole number"),
        ("maps: -4000", "maps is -4000; it must be 1 or more"),
        ("seed: x", "seed must be a whole number"),
        ("codec: 3", "codec must be"),
    ],
)
def test_values_of_another_kind_are_named(tmp_path, capsys, line, says):
    (tmp_path / "c.yaml").write_text(line)
    assert main.run(["codebook", "train", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err


def test_gpus_are_not_chosen_by_their_number(tmp_path, capsys):
    assert main.run(["codebook", "train", "--device", "cuda:1", "--out", str(tmp_path / "out")]) == 2
    assert "choose GPUs by CUDA_VISIBLE_DEVICES" in capsys.readouterr().err
