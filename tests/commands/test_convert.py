"""`perceptio convert`: what it writes and says, and what it refuses without leaving anything behind."""

import json
import os
import re
import resource
import signal
from pathlib import Path

import pytest
import torch
from helpers import depth_config
from original_aurora import aurora_tensors
from pickle_bomb import Bomb

from perceptio_hf import DepthVQVAE
from perceptio_hf.commands import main
from perceptio_hf.conversion.aurora import load_aurora
from perceptio_hf.conversion.sa2va import convert_sa2va


@pytest.fixture
def aurora(tmp_path) -> Path:
    path = tmp_path / "vae-final.pt"
    torch.save({"weights": {f"module.{name}": tensor for name, tensor in aurora_tensors(width=2).items()}}, path)
    return path


def test_the_guide_runs(tmp_path, aurora, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    guide = Path(__file__).parents[2] / "docs" / "convert.md"
    for block in re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, names)
    assert names["codes"].shape == (100,) and names["again"].shape == (320, 320)


def convert(*arguments) -> int:
    return main.run(["convert", *map(str, arguments)])


def refusal(capsys, *arguments) -> str:
    """Run, insist on exit code 2 and one line on standard error, and return that line."""
    assert convert(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    return captured.err


def test_a_depth_codec(tmp_path, aurora, capsys):
    assert convert("aurora-vqvae", aurora, tmp_path / "codec") == 0
    said = capsys.readouterr().out
    assert "53" in said and "mapped" in said and "24 codes of 12" in said and str(tmp_path / "codec") in said
    codec, expected = DepthVQVAE.from_pretrained(tmp_path / "codec"), load_aurora(aurora)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in codec.state_dict().items())
    assert sorted(os.listdir(tmp_path)) == ["codec", "vae-final.pt"]


def test_options_reach_the_codec_and_json_is_one_document(tmp_path, aurora, capsys):
    options = ("--image-size", 64, "--value-low", 0, "--value-high", 2, "--json")
    assert convert("aurora-vqvae", aurora, tmp_path / "codec", *options) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["out"] == str(tmp_path / "codec") and document["source"] == str(aurora)
    assert (document["read"], document["mapped"], document["ignored"], document["added"]) == (53, 53, [], {})
    assert document["names"]["_vq_vae._embedding"] == "depth_codebook.vectors"
    config = DepthVQVAE.from_pretrained(tmp_path / "codec").config
    assert (config.image_size, config.value_low, config.value_high) == (64, 0.0, 2.0)


def test_a_sam2_of_a_folder(tmp_path, capsys):
    from transformers import Sam2Model

    from perceptio_hf.lab.lessons.model import tiny_mask_config

    model = Sam2Model(tiny_mask_config())
    model.save_pretrained(tmp_path / "source")
    assert convert("sam2", tmp_path / "source", tmp_path / "sam", "--json") == 0
    assert json.loads(capsys.readouterr().out)["mapped"] == len(model.state_dict())
    again = Sam2Model.from_pretrained(tmp_path / "sam")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_an_existing_folder_is_replaced_only_where_asked(tmp_path, aurora, capsys):
    out = tmp_path / "codec"
    assert convert("aurora-vqvae", aurora, out) == 0
    (out / "stale").write_text("x")
    capsys.readouterr()
    assert "--overwrite" in refusal(capsys, "aurora-vqvae", aurora, out)
    assert (out / "stale").is_file()
    assert convert("aurora-vqvae", aurora, out, "--overwrite") == 0
    assert not (out / "stale").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("sam2", "OUT", "OUT"), "OUT is to be read"),
        (("sam2", "OUT/sam2.1_hiera_tiny.pt", "OUT"), "which is to be read"),
        (("aurora-vqvae", "OUT/vae-final.pt", "OUT"), "which is to be read"),
        (("sa2va", "OUT", "OUT"), "OUT is to be read"),
        (("sa2va", "me/sa2va", "OUT", "--depth-codec", "OUT/codec"), "which is to be read"),
    ],
    ids=str,
)
def test_what_is_read_is_never_replaced(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "OUT" / "codec").mkdir(parents=True)
    for name in ("config.json", "sam2.1_hiera_tiny.pt", "vae-final.pt"):
        (tmp_path / "OUT" / name).touch()
    assert says in refusal(capsys, *arguments, "--overwrite")
    assert len(os.listdir("OUT")) == 4


def test_a_given_codec_is_never_replaced(tmp_path):
    DepthVQVAE(depth_config()).save_pretrained(tmp_path / "codec")
    codec = DepthVQVAE.from_pretrained(tmp_path / "codec")
    with pytest.raises(ValueError, match="codec is to be read"):
        convert_sa2va("me/sa2va", tmp_path / "codec", depth_codec=codec, overwrite=True)


def test_running_out_of_disk_leaves_the_old_folder(tmp_path, aurora, capsys):
    """A limit on the size of files stands in for a full disk: the code fits, the weights do not."""
    out = tmp_path / "codec"
    assert convert("aurora-vqvae", aurora, out) == 0
    assert (out / "model.safetensors").stat().st_size > 100 * 1024
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails with an error, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))
    try:
        code = convert("aurora-vqvae", aurora, out, "--overwrite", "--image-size", 64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["codec", "vae-final.pt"]
    assert DepthVQVAE.from_pretrained(out).config.image_size == 320


@pytest.mark.parametrize("command", ["sam2", "aurora-vqvae"])
def test_a_pickle_bomb_is_refused_and_does_not_go_off(tmp_path, capsys, command):
    torch.save({"weights": {"a": torch.ones(1)}, "extra": Bomb(tmp_path / "made")}, tmp_path / "bomb.pt")
    assert "would run code" in refusal(capsys, command, tmp_path / "bomb.pt", tmp_path / "out")
    assert os.listdir(tmp_path) == ["bomb.pt"]


def test_what_is_not_recognised_is_refused_by_its_first_names(tmp_path, aurora, capsys):
    line = refusal(capsys, "sam2", aurora, tmp_path / "out")
    assert "unexpected encoder.0.weight (and 52 more); missing image_encoder.trunk.pos_embed" in line
    torch.save({"model": {"image_encoder.trunk.pos_embed": torch.ones(1)}}, tmp_path / "sam.pt")
    line = refusal(capsys, "aurora-vqvae", tmp_path / "sam.pt", tmp_path / "out")
    assert "unexpected image_encoder.trunk.pos_embed; missing encoder.0.weight" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["sam2", "aurora-vqvae", "sa2va"])
def test_a_source_that_is_not_there(tmp_path, capsys, command):
    assert "absent.pt" in refusal(capsys, command, tmp_path / "absent.pt", tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_a_truncated_file(tmp_path, aurora, capsys):
    aurora.write_bytes(aurora.read_bytes()[:-100])
    assert "cannot be read" in refusal(capsys, "aurora-vqvae", aurora, tmp_path / "out")


def test_a_side_that_does_not_fit(tmp_path, aurora, capsys):
    assert "multiple of" in refusal(capsys, "aurora-vqvae", aurora, tmp_path / "out", "--image-size", 100)
