"""`perceptio train --dry-run`: what is printed is what training would do."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import sft_helpers as sft
import yaml
from helpers import random_model

from perceptio_hf.commands.main import run
from perceptio_hf.data.sources import write_samples
from perceptio_hf.files import find_recipe
from perceptio_hf.training.planning.sharding import Layout, check_layout, layout_of_environment, layout_of_file
from perceptio_hf.training.recipe import read_recipe, training_set

ACCELERATE = Path(__file__).parents[3] / "recipes" / "accelerate"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random model and two sets of samples."""
    folder, processor = tmp_path_factory.mktemp("plan"), sft.processor()
    random_model(processor).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    write_samples(folder / "many", [sft.sample(number) for number in range(6)])
    write_samples(folder / "few", [sft.sample(number) for number in range(2)])
    return folder


def written(folder: Path, place: Path, **changes) -> str:
    """A recipe at `place` about the sets of `folder`."""
    values = {
        "model_name_or_path": str(folder / "model"),
        "data_folder": str(folder),
        "tasks": [{"samples": "many", "weight": 2}, {"samples": "few"}],
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "gradient_checkpointing": False,
        **changes,
    }
    place.write_text(yaml.safe_dump(values))
    return str(place)


@pytest.fixture
def recipe(folder, tmp_path):
    return lambda **changes: written(folder, tmp_path / "recipe.yaml", **changes)


@pytest.fixture(scope="module")
def plan(folder) -> dict:
    """That of the recipe as it stands, for this machine."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run(["train", "--config", written(folder, folder / "plain.yaml"), "--dry-run", "--json"]) == 0
    return json.loads(out.getvalue())


def test_samples_steps_and_memory_are_those_of_the_training(plan, folder, tmp_path):
    read = read_recipe(folder / "plain.yaml", ["--output_dir", "x"])
    mixed = training_set(read.arguments)
    assert plan["samples_per_epoch"] == len(mixed) and plan["samples_per_step"] == 4
    trainer = sft.trainer(tmp_path / "t", train=mixed, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.args.max_steps, trainer.args.num_train_epochs = -1, 3
    loader = trainer.get_train_dataloader()
    assert plan["steps"] == 3 * -(-len(loader) // 2)
    tokens = [trainer.data_collator([row])["input_ids"].shape[1] for row in mixed]
    assert plan["tokens_per_step"] == pytest.approx(4 * sum(tokens) / len(tokens), rel=0.05)
    assert [task["samples"] for task in plan["tasks"]] == [6, 2] and plan["tasks"][0]["share"] == pytest.approx(2 / 3)
    assert plan["trained"] == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert plan["memory"]["peak"] == sum(
        plan["memory"][part] for part in ("weights", "gradients", "optimizer", "activations", "gathered")
    )


def test_lines_for_people(recipe, capsys):
    assert run(["train", "--config", recipe(), "--dry-run", "--lora_r", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["task", "source", "samples", "share"]
    assert lines[1].split()[:4] == ["many", "samples", "6", "66.7%"]
    assert any(line.startswith("A step: 4 samples, about") and "epochs of 9 samples" in line for line in lines)
    assert any("x 4 bytes" in line for line in lines) and any("  peak" in line for line in lines)


def test_seconds_and_hours_are_measured(recipe, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measured = {"figures": [{"benchmark": "world-closest", "limit": 1}], "eval_strategy": "steps", "eval_steps": 2}
    file = recipe(max_steps=1000, **measured)  # of which nothing is done here
    assert run(["train", "--config", file, "--dry-run", "--measure", "3", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert 0 < plan["seconds_per_step"] < 60
    assert plan["hours"] == pytest.approx(plan["seconds_per_step"] * 1000 / 3600)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]  # nothing is left behind


def test_gpus_of_the_launch_are_reckoned_with(recipe, plan, capsys):
    assert run(["train", "--config", recipe(bf16=False), "--dry-run", "--json", "--launch", "fsdp2_8gpu"]) == 0
    shards = json.loads(capsys.readouterr().out)
    assert shards["samples_per_step"] == 8 * plan["samples_per_step"]
    assert shards["memory"]["weights"] == -(-plan["memory"]["weights"] // 8)
    at_once, alone = shards["memory"], plan["memory"]["activations"]
    assert 0 < at_once["activations"] <= alone <= at_once["activations"] + at_once["gathered"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": False}},
            "fsdp_reshard_after_forward is false",
        ),
        ({"fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True}}, "fsdp_offload_params is true"),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3, "offload_optimizer_device": "cpu"}},
            "offload_optimizer_device is cpu",
        ),
        ({"mixed_precision": "bf16"}, "mixed_precision is bf16, .* add --bf16 true"),
    ],
)
def test_what_a_launch_changes_and_the_plan_does_not_reckon_with(changes, message, recipe, tmp_path, capsys):
    file = tmp_path / "launch.yaml"
    given = yaml.safe_load(find_recipe("fsdp2_8gpu", "accelerate").read_text()) | {"mixed_precision": "no"}
    file.write_text(yaml.safe_dump(given | changes))
    assert run(["train", "--config", recipe(), "--dry-run", "--launch", str(file)]) == 2
    assert re.search(f"launch.yaml: {message}", capsys.readouterr().err)


def test_the_environment_of_a_launch_is_reckoned_with(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "true")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert layout_of_environment() == Layout(4, "fsdp")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(ValueError, match="accelerate launch: fsdp_offload_params is true"):
        layout_of_environment()


BOTH = "2 of 3 sources cannot be opened: "


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"tasks": [{"samples": "gone"}]}, ["--dry-run"], "gone holds no samples"),
        ({"tasks": [{"samples": "gone"}, {"world": "refer", "scenes": 2}, {"labels": "lost"}]}, ["--dry-run"], BOTH),
        ({"tasks": [{"world": "refer", "scenes": 2}]}, ["--dry-run"], "set max_steps"),
        ({}, ["--dry-run", "--launch", "fsdp2_8gpu", "--measure", "2"], "processes that are here, 1, and --launch"),
        ({"max_length": 5}, ["--dry-run"], "more than max_length=5"),
        ({}, ["--measure", "5"], "belong to --dry-run"),
        ({"recipe": "tiny"}, ["--dry-run"], "--dry-run is for fine-tuning"),
        ({}, ["--dry-run", "--launch", "nowhere"], "There is no recipe nowhere"),
        ({}, ["--dry-run", "--recipe", "grpo"], "--recipe is grpo, but the file is a recipe of kind sft"),
        ({"push_to_hub": True}, ["--dry-run", "--measure", "3"], "`perceptio push OUT/checkpoint"),
        ({}, ["--dry-run", "--launch", "fsdp2_8gpu", "--lora_r", "4"], "whose rows PEFT trains one by one"),
        ({"bf16": True}, ["--dry-run", "--launch", "zero3_8gpu"], "bf16 under DeepSpeed's ZeRO-3 rounds all weights"),
        (
            {"bf16": False, "seg_projector_start": 8},
            ["--dry-run", "--launch", "zero3_8gpu"],
            "in shards from when it is loaded",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_line(changes, options, message, recipe, capsys):
    capsys.readouterr()
    assert run(["train", "--config", recipe(**changes), *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("perceptio: ")]
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("1gpu", Layout(1)),
        ("ddp_8gpu", Layout(8)),
        ("fsdp2_8gpu", Layout(8, "fsdp")),
        ("zero3_8gpu", Layout(8, "zero3")),
        ("fsdp2_2x8gpu", Layout(16, "fsdp")),
    ],
)
def test_layouts_of_the_configurations_that_ship(name, layout):
    assert layout_of_file(ACCELERATE / f"{name}.yaml") == layout


def test_a_start_that_comes_when_the_model_is_in_shards_is_not_planned(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: tiny\ntasks: [{world: refer, scenes: 2}]\n")
    given = ["--output_dir", "x", "--seg_projector_start", "8", "--seg_projector_start_step", "2"]
    recipe = read_recipe(tmp_path / "recipe.yaml", given)
    check_layout(Layout(2), recipe)
    with pytest.raises(ValueError, match="leave it out, so that the start comes before the first step"):
        check_layout(Layout(2, "fsdp"), recipe)


def test_layouts_that_cannot_be_reckoned_with(tmp_path, monkeypatch):
    file = tmp_path / "a.yaml"
    for text, message in (
        ("distributed_type: FSDP\nnum_processes: 2", "fsdp_version is None; expected 2"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 2}", "zero_stage is 2; expected 3"),
        ("num_processes: many", "num_processes is 'many'"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            layout_of_file(file)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert layout_of_environment() == Layout(4)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert layout_of_environment() == Layout(4, "fsdp")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert layout_of_environment() == Layout(4, "zero3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    with pytest.raises(ValueError, match="zero_stage is 2; expected 3"):
        layout_of_environment()


@pytest.mark.parametrize("file", sorted(ACCELERATE.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_what_the_configurations_say(file):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    known = {action.dest for action in launch_command_parser()._actions}
    config, layout = load_config_from_file(str(file)), layout_of_file(file)  # refuses keys that it does not know
    assert config.num_processes == layout.processes
    assert config.mixed_precision == ("no" if layout.strategy == "zero3" else "bf16")  # see perceptio_hf.training.zero3
    assert set(config.fsdp_config or ()) <= known and set(config.deepspeed_config or ()) <= known
    if layout.strategy == "fsdp":
        assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False  # see perceptio_hf.training.fsdp
