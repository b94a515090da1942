"""What a card may say about the training, and what it may not."""

import json
from pathlib import Path

import pytest
import yaml

from perceptio_hf.hub.training_record import TrainingRecord, is_hub_name, read_training

RECIPES = Path(__file__).parents[2] / "recipes"
SFT = {"model_name_or_path": "me/perceptio", "tasks": [{"world": "refer"}], "learning_rate": 1e-4}


def trained(folder: Path, recipe, name: str = "checkpoint") -> Path:
    """A folder as `perceptio train` leaves it."""
    (folder / name).mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder / name


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint-150", "merged"])
def test_a_recipe_beside_the_folder_is_told(tmp_path, name):
    recipe = yaml.safe_load((RECIPES / "sft_world.yaml").read_text())
    record = read_training(trained(tmp_path, recipe, name))
    assert record.lines[0] == "Fine-tuned by `perceptio train` as a whole, from the tiny checkpoint of the package, on:"
    assert "- rendered scenes: refer, 2000 scenes, weight 2" in record.lines
    assert len([line for line in record.lines if line.startswith("- ")]) == len(recipe["tasks"])
    assert record.settings["learning_rate"] == recipe["learning_rate"] and record.settings["mask_bce_weight"] == 2.0
    assert record.base_model is None


def test_lora_and_the_base_on_the_hub_are_told(tmp_path):
    record = read_training(trained(tmp_path, SFT | {"lora_r": 16}))
    assert record.base_model == "me/perceptio"
    assert "with LoRA adapters, from me/perceptio" in record.lines[0] and record.settings["lora_r"] == 16


def test_a_local_base_is_no_repository(tmp_path):
    (tmp_path / "me" / "perceptio").mkdir(parents=True)
    record = read_training(trained(tmp_path / "runs" / "x", SFT))
    assert record.base_model is None and "from a local checkpoint" in record.lines[0]


def test_a_base_that_was_a_folder_is_none_elsewhere_either(tmp_path):
    """Pushed from another machine: "models/start" reads like a name on the Hub."""
    record = read_training(trained(tmp_path, SFT | {"model_is_folder": True}))
    assert record.base_model is None and "from a local checkpoint" in record.lines[0]


def test_places_on_the_disk_are_not_told(tmp_path):
    places = {
        "model_name_or_path": "/home/ann/secret/base",
        "data_folder": "/home/ann/secret",
        "output_dir": "/home/ann",
    }
    tasks = [{"samples": "/home/ann/secret/rooms.jsonl"}, {"depth_folder": "secret/depth", "unit": "mm", "weight": 0.5}]
    record = read_training(trained(tmp_path, SFT | places | {"tasks": tasks}))
    assert "ann" not in repr(record) and "secret" not in repr(record)
    assert record.lines[-2:] == ("- samples: rooms", "- pictures with depth: depth, weight 0.5")


@pytest.mark.parametrize("recipe", ['{"flour": 500}', '{"tasks": 3}', "[1]", "{", ""])
def test_a_recipe_of_another_program_is_not_read(tmp_path, recipe):
    folder = trained(tmp_path, {})
    (tmp_path / "recipe.json").write_text(recipe)
    assert read_training(folder) == TrainingRecord()


def test_only_the_folders_of_a_run_look_beside_themselves(tmp_path):
    assert read_training(trained(tmp_path, SFT, name="other")) == TrainingRecord()


def test_training_from_scratch(tmp_path):
    recipe = yaml.safe_load((RECIPES / "tiny.yaml").read_text())
    assert "from scratch" in read_training(trained(tmp_path, recipe)).lines[0]


def test_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert is_hub_name("OpenGVLab/InternVL3-1B-hf")
    assert not any(map(is_hub_name, ("runs/mine", "tiny", "", "./a/b", "/a/b", "a/b/c", "a b/c", "a/-b")))
