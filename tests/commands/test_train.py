"""`perceptio train` with fine-tuning recipes."""

import json
from pathlib import Path

import pytest
import sft_helpers as sft
import yaml
from helpers import assert_trained_alike, random_model
from PIL import Image
from safetensors.torch import load_file

from perceptio_hf import PerceptioForConditionalGeneration, PerceptioProcessor, PerceptioSFTConfig
from perceptio_hf.commands.main import run
from perceptio_hf.data.keys import check_keys
from perceptio_hf.data.sources import write_samples
from perceptio_hf.data.tasks import load_tasks
from perceptio_hf.training.recipe import read_recipe, training_set

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A saved model with random weights that fits `sft_helpers.sample`."""
    folder, processor = tmp_path_factory.mktemp("model") / "random", sft.processor()
    random_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    return write_samples(tmp_path_factory.mktemp("data") / "balls", [sft.sample(number) for number in range(8)])


@pytest.fixture
def recipe(tmp_path, checkpoint, samples):
    """Write a recipe; keywords change its keys, None leaves one out."""

    def write(**changes) -> Path:
        values = {
            "model_name_or_path": str(checkpoint),
            "tasks": [{"samples": str(samples), "weight": 2}],
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": "1e-4",
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_steps": 1,
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return path

    return write


@pytest.fixture
def fails(capsys):
    """Run a command that must fail with exit code 2 and one line; returns the line."""

    def check(*arguments: str | Path) -> str:
        capsys.readouterr()
        assert run(["train", *map(str, arguments)]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        lines = [line for line in lines if line.startswith("perceptio: ")]
        assert len(lines) == 1
        return lines[0]

    return check


def test_trains_draws_and_goes_on(tmp_path, recipe, samples, capsys, fails):
    out = tmp_path / "out"
    arguments = ["train", "--config", str(recipe(eval_tasks=[{"samples": str(samples)}], adam_epsilon="1e-3"))]
    arguments += ["--out", str(out)]
    assert run(arguments) == 0
    assert str(out / "checkpoint") in capsys.readouterr().out
    PerceptioForConditionalGeneration.from_pretrained(out / "checkpoint")
    PerceptioProcessor.from_pretrained(out / "checkpoint")
    with Image.open(out / "losses.png") as picture:
        picture.verify()
    assert json.loads((out / "recipe.json").read_text())["max_steps"] == 2
    first = load_file(out / "checkpoint" / "model.safetensors")

    assert run(arguments) == 0
    assert "is finished" in capsys.readouterr().out

    for folder in ("checkpoint", "checkpoint-2"):  # as if the run had been stopped after its first step
        (out / folder).rename(tmp_path / folder)
    assert run(arguments) == 0
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2]
    assert_trained_alike(load_file(out / "checkpoint" / "model.safetensors"), first)

    assert "another recipe" in fails(*arguments[1:], "--max_steps", "3")
    assert run([*arguments, "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 0
    assert (out / "checkpoint-3").is_dir()


def test_options_take_the_place_of_keys(recipe):
    read = read_recipe(recipe(), ["--max_steps", "7", "--learning-rate=0.5", "--no_plot_losses"])
    assert (read.settings.max_steps, read.settings.learning_rate, read.settings.plot_losses) == (7, 0.5, False)
    assert read.settings.per_device_train_batch_size == 4
    assert read.values["max_steps"] == 7 and "seed" not in read.values


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rat": 1e-4}, "unknown key 'learning_rat'; did you mean learning_rate"),
        ({"text_wieght": 1.0}, "did you mean text_weight"),
        ({"zzzzzz": 1}, "unknown key 'zzzzzz'; known are"),
        ({"max_steps": "ten"}, "max_steps must be a whole number, got 'ten'"),
        ({"max_steps": 1.5}, "max_steps must be a whole number, got 1.5"),
        ({"max_steps": [1]}, "max_steps must be a whole number"),
        ({"bf16": "perhaps"}, "bf16 must be true or false"),
        ({"learning_rate": "fast"}, "learning_rate must be a number"),
        ({"tasks": "balls"}, "tasks must be a list"),
        ({"lr_scheduler_type": 3}, "lr_scheduler_type must be a text"),
        ({"lr_scheduler_type": "sine"}, "sine"),
        ({"text_weight": -1.0}, "text_weight is -1.0"),
        ({"max_steps": 0}, "trains nothing"),
        ({"model_name_or_path": None}, "set model_name_or_path"),
        ({"model_name_or_path": "/no/such/folder"}, "/no/such/folder"),
        ({"tasks": None}, "trains on nothing"),
        ({"tasks": []}, "trains on nothing"),
        ({"tasks": [{"weight": 1}]}, "needs one of the keys world, samples, depth_folder"),
        ({"tasks": [{"world": "refer", "samples": "x"}]}, "needs one of the keys"),
        ({"tasks": [{"world": "refer", "scene": 3}]}, "unknown key 'scene'; did you mean scenes"),
        ({"tasks": [{"world": "refer"}]}, "lacks scenes"),
        ({"tasks": [{"world": "refer", "scenes": "many"}]}, "scenes must be a whole number"),
        ({"tasks": [{"world": "referring", "scenes": 3}]}, "Unknown task 'referring'"),
        ({"tasks": [{"world": "refer", "scenes": 3}] * 2}, "has the name 'refer' of an earlier one"),
        ({"tasks": [{"samples": "/no/such/samples"}]}, "/no/such/samples holds no samples"),
        ({"tasks": [{"depth_folder": "/no/such/folder"}]}, "lacks unit"),
        ({"packing": True}, "packing"),
        ({"recipe": "cake"}, "recipe is 'cake'; choose sft"),
    ],
)
def test_mistakes_get_one_line(tmp_path, recipe, fails, changes, words):
    assert words in fails("--config", recipe(**changes), "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "recipe.json").exists()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--max_step", "3"], "unknown key 'max_step'; did you mean max_steps"),
        (["--max_steps", "many"], "--max_steps"),
        (["--processes", "2"], "accelerate launch"),
        (["--resume_from_checkpoint", "/no/such/place"], "no checkpoint /no/such/place"),
        (["--resume_from_checkpoint", "true"], "no complete checkpoint"),
    ],
)
def test_mistaken_options_get_one_line(tmp_path, recipe, fails, option, words):
    assert words in fails("--config", recipe(), "--out", tmp_path / "out", *option)


@pytest.mark.parametrize(
    ("text", "words"), [(None, "There is no recipe"), ("a: [", "is not YAML"), ("- a", "must hold keys and values")]
)
def test_files_that_are_no_recipe(tmp_path, fails, text, words):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    assert words in fails("--config", path)


def test_a_bad_sample_is_named(tmp_path, recipe, samples, fails, capsys):
    lines = (samples / "samples.jsonl").read_text().splitlines()
    broken = json.loads(lines[0])
    broken["masks"] = []
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "files").symlink_to(samples / "files")
    (bad / "samples.jsonl").write_text("\n".join([*lines[1:], json.dumps(broken)]))
    path = recipe(tasks=[{"samples": str(bad)}], max_steps=4)
    assert "[SEG]" in fails("--config", path, "--out", tmp_path / "out")
    assert run(["train", "--config", str(path), "--out", str(tmp_path / "skip"), "--on_error", "skip"]) == 0
    assert "left out because of their masks" in capsys.readouterr().out


def test_tiny_recipes_still_train_from_scratch(tmp_path, monkeypatch, fails):
    from perceptio_hf.lab.lessons import stages as tiny

    called = []
    monkeypatch.setattr(tiny.TinyRecipe, "read", classmethod(lambda cls, path: path))
    monkeypatch.setattr(tiny, "train_tiny", lambda *arguments, **options: called.append((*arguments, options)))
    path = tmp_path / "scratch.yaml"
    path.write_text("recipe: tiny\nseed: 3\n")
    assert run(["train", "--config", str(path), "--out", str(tmp_path / "out"), "--workers", "0"]) == 0
    assert called == [(path, tmp_path / "out", {"processes": 2, "workers": 0})]
    assert "Unknown options --max_steps 3" in fails("--config", path, "--max_steps", "3")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("sft*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_can_be_read(tmp_path, path):
    read = read_recipe(path, ["--output_dir", str(tmp_path)])
    assert isinstance(read.settings, PerceptioSFTConfig)
    first = next(iter(training_set(read.arguments)))
    assert first["images"] and first["messages"]
    assert set(load_tasks(read.arguments.eval_tasks)[0]) == {"refer", "spatial"}


def test_hints_of_unknown_keys():
    with pytest.raises(ValueError, match="here: unknown key 'wieght'; did you mean weight"):
        check_keys(["wieght"], ["weight", "name"], "here")
