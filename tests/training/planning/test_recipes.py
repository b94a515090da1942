"""The recipes at the paper's size: their sources are opened, in small, and the tiny model is planned by them."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from data.published.test_labels import write_labels
from data.published.test_sources import turn, write_ade, write_instances, write_llava
from evaluation.published_formats import scenes_of, write_grefcoco, write_refcoco

from perceptio_hf import PerceptioForConditionalGeneration, PerceptioProcessor, tiny_checkpoint
from perceptio_hf.commands import train
from perceptio_hf.commands.main import run
from perceptio_hf.conversion.saved_models import load_depth_codec
from perceptio_hf.modeling.codec_identity import codec_fingerprint
from perceptio_hf.training.recipe import read_recipe

RECIPES = Path(__file__).parents[3] / "recipes"
REAL = ("perceptio_1b", "perceptio_2b", "perceptio_8b", "warm_start_sa2va")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Every source of the recipes, as docs/train_a_real_one.md lays them out."""
    folder, scenes = tmp_path_factory.mktemp("data"), scenes_of(range(4))
    for name, by in (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")):
        write_refcoco(folder / name, scenes, by=by)
    write_grefcoco(folder / "grefcoco", scenes, split="train")
    write_instances(folder / "coco", scenes)
    (folder / "coco" / "train2014").symlink_to(folder / "refcoco" / "train2014")
    (folder / "refs").mkdir()
    write_refcoco(folder / "tested", scenes[:1])
    (folder / "refs" / "refcoco").symlink_to(folder / "tested")
    write_ade(folder / "ADEChallengeData2016", scenes)
    fingerprint = codec_fingerprint(load_depth_codec(tiny_checkpoint()))
    codec = {"name": "tiny", "fingerprint": fingerprint, "num_tokens": 64, "num_codes": 128}
    write_labels(folder / "labels", scenes, ids="{:012d}.jpg", codec=codec)
    write_llava(folder / "llava", [{"id": "a", "image": "coco/1.jpg", "conversations": turn("<image>\nWhat is it?")}])
    (folder / "llava" / "llava.json").rename(folder / "llava" / "llava_v1_5_mix665k.json")
    (folder / "llava" / "images").mkdir()
    (folder / "llava" / "coco").rename(folder / "llava" / "images" / "coco")
    return folder


def planned(name: str, data: Path, *options: str) -> dict:
    out = io.StringIO()
    given = ["--data_folder", str(data), "--model_name_or_path", "tiny", "--dry-run", "--json", *options]
    with redirect_stdout(out):
        assert run(["train", "--config", name, *given]) == 0
    return json.loads(out.getvalue())


@pytest.mark.parametrize("name", ["perceptio_1b", "warm_start_sa2va"])
def test_the_recipe_opens_all_its_sources(name, data):
    plan = planned(name, data, "--launch", "ddp_8gpu")
    assert all(task["looked_at"] and not task["left_out"] for task in plan["tasks"])
    found = {task["name"]: task for task in plan["tasks"]}
    assert found["spatial"]["spans"] == 1 and found["depth"]["masks"] == 0 and found["refcocog"]["masks"] >= 2
    assert found["words"]["samples"] == 1
    assert plan["samples_per_step"] == 128
    assert plan["questions_per_evaluation"] > 64 and plan["answering"] is None  # every GPU has the whole model
    if name == "perceptio_1b":
        assert plan["trained"] > 0.4 * plan["parameters"]
        assert found["refcoco"]["samples"] == found["coco"]["samples"] == 3  # one picture of four is held out


def test_what_evaluations_answer_is_opened_and_the_copy_that_answers_is_reckoned_with(data, tmp_path, capsys):
    plan = planned("perceptio_1b", data, "--launch", "fsdp2_8gpu")
    memory = plan["memory"]
    weights = memory["weights"] * 8
    assert plan["answering"] == pytest.approx(weights + memory["weights"] + memory["optimizer"], rel=1e-3)
    given = ["train", "--config", "perceptio_1b", "--data_folder", str(data), "--model_name_or_path", "tiny"]
    given += ["--dry-run", "--launch", "fsdp2_8gpu"]
    assert run(given) == 0
    assert f"for {plan['questions_per_evaluation']} questions: the first GPU gathers" in capsys.readouterr().out
    recipe = (RECIPES / "perceptio_1b.yaml").read_text()
    (tmp_path / "other.yaml").write_text(recipe.replace("data: refcoco", "data: elsewhere"))
    given[2] = str(tmp_path / "other.yaml")
    assert run(given) == 2
    assert f"There is no {data / 'elsewhere'}; refcoco needs a folder with refs(unc).p" in capsys.readouterr().err


def test_the_sizes_differ_in_what_belongs_to_their_size():
    lines = {name: (RECIPES / f"{name}.yaml").read_text().splitlines() for name in REAL[:3]}
    whole = [[line for line in text if not line.startswith("#")] for text in lines.values()]
    assert len({len(text) for text in whole}) == 1
    differ = {row[0].split(":")[0] for row in zip(*whole, strict=True) if len(set(row)) > 1}
    sizes = {"model_name_or_path", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"}
    assert differ == sizes


def test_adapters_instead_of_the_whole_model(data):
    options = ("--lora_r", "8", "--lora_modules_to_save", "seg_projector", "--learning_rate", "2.0e-4")
    plan = planned("perceptio_8b", data, *options)
    assert plan["trained"] < 0.3 * plan["parameters"]


def test_codes_of_another_codec_are_noticed_before_the_training(data, tmp_path, capsys):
    write_labels(tmp_path / "labels", scenes_of(range(2)))
    (tmp_path / "recipe.yaml").write_text(json.dumps({"model_name_or_path": "tiny", "tasks": [{"labels": "labels"}]}))
    given = ["train", "--config", str(tmp_path / "recipe.yaml"), "--data_folder", str(tmp_path), "--dry-run"]
    assert run(given) == 2
    error = capsys.readouterr().err
    assert "codes of the codec codec (64 codes of 128), 0123456789abcdef" in error and "Label with the model's" in error


def test_codes_are_compared_with_the_codec_that_is_saved(data, tmp_path, monkeypatch):
    """Under ZeRO-3 no process holds the weights of the codec that it has loaded."""
    model = PerceptioForConditionalGeneration.from_pretrained(tiny_checkpoint())
    for parameter in model.depth_model.parameters():
        parameter.data = parameter.new_empty(0)
    processor = PerceptioProcessor.from_pretrained(tiny_checkpoint())
    monkeypatch.setattr(train, "_start", lambda recipe: (model, processor))
    given = {"model_name_or_path": "tiny", "tasks": [{"labels": "labels"}], "data_folder": str(data), "max_steps": 1}
    (tmp_path / "recipe.yaml").write_text(json.dumps(given | {"report_to": "none", "bf16": False}))
    recipe = read_recipe(tmp_path / "recipe.yaml", ["--output_dir", str(tmp_path / "out")])
    assert len(train._trainer(recipe).train_dataset)
    write_labels(tmp_path / "labels", scenes_of(range(2)))
    recipe.arguments.data_folder = str(tmp_path)
    with pytest.raises(ValueError, match="Label with the model's"):
        train._trainer(recipe)
