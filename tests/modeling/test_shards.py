"""An index of shards names files of its own folder, or nothing is loaded."""

import json
import shutil

import pytest
from helpers import depth_config

from perceptio_hf import DepthVQVAE, PerceptioForConditionalGeneration
from perceptio_hf.conversion.saved_models import load_depth_codec
from perceptio_hf.modeling.shards import check_shards

OUTSIDE = ["../outside.safetensors", "/outside.safetensors", "a/../../outside.safetensors", "..\\outside.safetensors",
           "C:\\outside.safetensors", "C:outside.safetensors"]  # fmt: skip


def index(folder, name):
    folder.mkdir(exist_ok=True)
    document = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_that_leaves_its_folder(tmp_path, name):
    index(tmp_path / "part", name)
    for arguments in ((tmp_path / "part",), (tmp_path, "part")):
        with pytest.raises(ValueError, match="outside its own folder"):
            check_shards(*arguments)


@pytest.mark.parametrize("other", ["model.safetensors.index.fp16.json", "pytorch_model.bin.index.json"])
def test_every_name_of_an_index_is_looked_at(tmp_path, other):
    index(tmp_path, OUTSIDE[0])
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / other)
    with pytest.raises(ValueError, match="outside its own folder"):
        check_shards(tmp_path)


def test_indices_of_other_things_are_not_ours(tiny_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "retrieval.index.json").write_text("[]")
    model = PerceptioForConditionalGeneration.from_pretrained(folder)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    monkeypatch.chdir(tmp_path)  # where no model is named, nothing is loaded from here
    PerceptioForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=model.state_dict())


def test_what_stays_inside(tmp_path):
    for name in ("model-2.safetensors", "shards/model-2.safetensors", "model..2.safetensors"):
        index(tmp_path, name)
        check_shards(tmp_path)
    check_shards("owner/name")
    check_shards(tmp_path / "missing")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "\xff"])
def test_what_is_no_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="is not the index"):
        check_shards(tmp_path)


def test_models_are_not_loaded_from_outside(tiny_folder, tmp_path):
    """Sharded for real, then one shard is moved out and the index follows it."""
    folder = tmp_path / "model"
    model = PerceptioForConditionalGeneration.from_pretrained(tiny_folder)
    model.save_pretrained(folder, max_shard_size="300KB")
    assert PerceptioForConditionalGeneration.from_pretrained(folder).dtype == model.dtype
    document = json.loads((folder / "model.safetensors.index.json").read_text())
    name = next(iter(document["weight_map"].values()))
    shutil.move(folder / name, tmp_path / name)
    places = {key: f"../{place}" if place == name else place for key, place in document["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({**document, "weight_map": places}))
    with pytest.raises(ValueError, match="outside its own folder"):
        PerceptioForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(ValueError, match="outside its own folder"):
        load_depth_codec(folder)


def test_codecs_are_not_loaded_from_outside(tmp_path):
    DepthVQVAE(depth_config()).save_pretrained(tmp_path / "codec")
    index(tmp_path / "codec", "../outside.safetensors")
    with pytest.raises(ValueError, match="outside its own folder"):
        load_depth_codec(tmp_path / "codec")
