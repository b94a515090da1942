"""The command: its options, its outputs, and one line for a user's mistake."""

import json
import subprocess
import sys

import pytest
import torch
import typer
from component_helpers import codec, mask_model, save_internvl
from transformers import AutoModel, AutoProcessor

from perceptio_hf import PerceptioConfig, tiny_checkpoint
from perceptio_hf.commands import main
from perceptio_hf.commands.build import build
from perceptio_hf.conversion.export import export_internvl


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("parts")
    mask_model().save_pretrained(folder / "sam2")
    codec().save_pretrained(folder / "codec")
    return {
        "--internvl": str(save_internvl(folder / "internvl", padding=7)),
        "--mask-decoder": str(folder / "sam2"),
        "--depth-codec": str(folder / "codec"),
    }


@pytest.fixture
def run(monkeypatch, capsys):
    """(exit code, standard output, standard error) of `perceptio build` with options."""
    app = typer.Typer()
    app.callback()(lambda: None)
    app.command()(build)
    monkeypatch.setattr(main, "app", app)

    def call(options: dict[str, str], *more: str) -> tuple[int, str, str]:
        code = main.run(["build", *(word for pair in options.items() for word in pair), *more])
        return code, *capsys.readouterr()

    return call


def test_what_it_says(run, options, tmp_path):
    code, said, errors = run({**options, "--out": str(tmp_path / "out")})
    assert (code, errors) == (0, "")
    assert said.startswith(f"{tmp_path / 'out'}: ") and "InternVL with qwen2 in float32" in said
    assert "vocabulary: 407 -> 419 rows, 19 new tokens from 400 on" in said
    assert "masks from pictures of 128 pixels; depth as 4 x 4 of 16 codes" in said
    assert "tensors are the parts', bit for bit; 400 logits at" in said
    assert "of 6 prompts are the InternVL's within rounding" in said
    assert AutoModel.from_pretrained(tmp_path / "out").config.seg_token_id == 400


def test_like(run, options, tmp_path):
    """An InternVL that knows the spatial tokens: a hint without --like, the name with it; and never both."""
    code, _, errors = run({**options, "--out": str(tmp_path / "old")}, "--no-verify")
    assert (code, errors) == (0, "")
    export_internvl(
        AutoModel.from_pretrained(tmp_path / "old"),
        AutoProcessor.from_pretrained(tmp_path / "old"),
        tmp_path / "served",
    )
    served = {**options, "--internvl": str(tmp_path / "served"), "--out": str(tmp_path / "new")}
    code, said, errors = run(served, "--no-verify")
    assert (code, errors) == (
        0,
        "",
    ) and "the [SEG] projector is new: if it was exported from a Perceptio, --like" in said
    code, _, errors = run({**served, "--like": str(tmp_path / "old")}, "--overwrite")
    assert code == 2 and errors.startswith("perceptio: Both like and a mask decoder and a depth codec are given")
    like = {"--internvl": served["--internvl"], "--out": served["--out"], "--like": str(tmp_path / "old")}
    code, said, errors = run(like, "--overwrite")
    assert (code, errors) == (0, "") and f"mask settings are those of {tmp_path / 'old'}\n" in said
    one, other = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("old", "new"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    code, _, errors = run({"--internvl": served["--internvl"], "--out": str(tmp_path / "other")})
    assert code == 2 and "No mask decoder is given; name both of them, or a Perceptio as like" in errors


def test_json_and_the_other_options(run, options, tmp_path):
    more = ["--no-verify", "--json", "--dtype", "bfloat16", "--max-shard-size", "400KB", "--seed", "5"]
    code, said, errors = run({**options, "--out": str(tmp_path / "out")}, *more)
    document = json.loads(said)
    assert (code, errors, document["check"], document["dtype"]) == (0, "", None, "bfloat16")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    code, said, _ = run({**options, "--out": str(tmp_path / "out")}, "--json", "--overwrite")
    assert code == 0 and json.loads(said)["check"]["sampled"] is False
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "more", "says"),
    [
        ({"--internvl": "nothing-here"}, (), "no file or folder nothing-here"),
        ({"--internvl": "{--mask-decoder}"}, (), "is not an InternVL: model_type in config.json is 'sam2'"),
        ({"--mask-decoder": "{--internvl}"}, (), "is not a SAM2 checkpoint"),
        ({"--depth-codec": "{--mask-decoder}"}, (), "is not a depth codec"),
        ({"--out": "{--internvl}"}, (), "is to be read; name another folder"),
        ({}, ("--dtype", "int4"), "--dtype"),
        ({"--internvl": "absent"}, ("--max-shard-size", "huge"), "max_shard_size is 'huge'; expected a number"),
        ({}, ("--seed", "-1"), "--seed"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(run, options, tmp_path, changes, more, says):
    given = {**options, "--out": str(tmp_path / "out")}
    places = {name: value.format_map(given) for name, value in changes.items()}
    code, said, errors = run(given | places, *more)
    assert (code, said, len(errors.splitlines())) == (2, "", 1) and "Traceback" not in errors
    assert says in errors and not (tmp_path / "out").exists()


def test_tiny_is_the_embedded_codec(run, options, tmp_path):
    code, said, _ = run({**options, "--depth-codec": "tiny", "--out": str(tmp_path / "out")}, "--no-verify", "--json")
    config = PerceptioConfig.from_pretrained(tiny_checkpoint())
    assert (code, json.loads(said)["depth_codes"]) == (0, config.num_depth_codes)


def test_a_missing_option_is_named(run, options):
    code, _, errors = run(options)
    assert code == 2 and "--out" in errors


def test_the_module_costs_nothing_to_import():
    code = "import sys, perceptio_hf.commands.build; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
