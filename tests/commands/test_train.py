"""`perceptio train` with fine-tuning recipes."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import sft_helpers as sft
import yaml
from helpers import assert_trained_alike, random_model
from PIL import Image
from safetensors.torch import load_file

from perceptio_hf import PerceptioForConditionalGeneration, PerceptioProcessor, PerceptioSFTConfig
from perceptio_hf.commands import checkpoints
from perceptio_hf.commands.main import run
from perceptio_hf.data.keys import check_keys
from perceptio_hf.data.sources import write_samples
from perceptio_hf.data.tasks import load_tasks
from perceptio_hf.extras import how_to_install
from perceptio_hf.files import find_recipe
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
            "plot_losses": False,
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
    arguments = [
        "train",
        "--config",
        str(recipe(eval_tasks=[{"samples": str(samples)}], adam_epsilon="1e-3", plot_losses=True)),
    ]
    arguments += ["--out", str(out)]
    assert run(arguments) == 0
    assert str(out / "checkpoint") in capsys.readouterr().out
    PerceptioForConditionalGeneration.from_pretrained(out / "checkpoint")
    PerceptioProcessor.from_pretrained(out / "checkpoint")
    with Image.open(out / "losses.png") as picture:
        picture.verify()
    written = json.loads((out / "recipe.json").read_text())
    assert written["max_steps"] == 2 and written["model_is_folder"] == Path(written["model_name_or_path"]).is_dir()
    assert not (out / "README.md").exists()  # TRL's card, of a text model
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
        ({"push_to_hub": True}, "`perceptio push OUT/checkpoint"),
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
        (["--recipe", "grpo"], "--recipe is grpo, but the file is a recipe of kind sft"),
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
    (bad / "samples.jsonl").write_text(json.dumps(broken))
    out = tmp_path / "nothing"
    assert "Every sample was left out" in fails("--config", path, "--out", out, "--on_error", "skip")
    assert not (out / "checkpoint").exists()


def test_tiny_recipes_still_train_from_scratch(tmp_path, monkeypatch, fails):
    from perceptio_hf.lab.lessons import stages as tiny

    called = []
    monkeypatch.setattr(tiny.TinyRecipe, "read", classmethod(lambda cls, path: path))
    monkeypatch.setattr(tiny, "train_tiny", lambda *arguments, **options: called.append((*arguments, options)))
    path = tmp_path / "scratch.yaml"
    path.write_text("recipe: tiny\nseed: 3\n")
    assert run(["train", "--config", str(path), "--out", str(tmp_path / "out"), "--workers", "0"]) == 0
    assert called == [(path, tmp_path / "out", {"processes": 2, "workers": 0, "device": "cpu"})]
    called.clear()
    assert "--device nowhere cannot be used here" in fails("--config", path, "--device", "nowhere")
    assert not called
    monkeypatch.setattr(checkpoints, "check_device", lambda device: None)
    assert run(["train", "--config", str(path), "--out", str(tmp_path / "out"), "--device", "cuda"]) == 0
    assert called == [(path, tmp_path / "out", {"processes": 1, "workers": 1, "device": "cuda"})]
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


def test_recipes_of_the_package_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = RECIPES / "sft_world.yaml"
    for name in ("sft_world", "sft_world.yaml", "recipes/sft_world.yaml"):
        assert find_recipe(name).samefile(shipped)
    (tmp_path / "sft_world").write_text("seed: 1")
    assert find_recipe("sft_world") == Path("sft_world"), "a file of one's own goes first"
    with pytest.raises(ValueError, match=r"no recipe mine/tiny.yaml; .*: ablation, codebook_tiny, .*, tiny, "):
        find_recipe("mine/tiny.yaml")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("internvl", "run `perceptio build`"),
        ("internvl_chat", "run `perceptio build`"),
        ("sa2va_chat", "`perceptio convert sa2va`"),
        ("bert", "name the folder or repository of a Perceptio checkpoint"),
    ],
)
def test_models_of_another_kind(tmp_path, recipe, fails, kind, words):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": kind}))
    line = fails("--config", recipe(model_name_or_path=str(tmp_path / "other")), "--out", tmp_path / "out")
    assert f"is a {kind!r} model, no Perceptio" in line and words in line


@pytest.mark.parametrize("damage", ["model.safetensors", "config.json", "processor_config.json"])
def test_a_damaged_start_gets_one_line(tmp_path, checkpoint, recipe, fails, damage):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / damage).write_bytes((copy / damage).read_bytes()[:100])
    assert "copy cannot be loaded as a Perceptio" in fails("--config", recipe(model_name_or_path=str(copy)))


@pytest.mark.parametrize(
    ("name", "words"),
    [("tensorboard", "report_to names tensorboard, which is not installed: pip install"), ("tensorbord", "known are")],
)
def test_reports_that_cannot_be_made_are_refused_before_the_training(tmp_path, recipe, fails, monkeypatch, name, words):
    monkeypatch.setattr("perceptio_hf.training.config.get_available_reporting_integrations", lambda: [])
    line = fails("--config", recipe(report_to=name), "--out", tmp_path / "out")
    assert words in line and not (tmp_path / "out").exists()


def test_a_missing_library_says_how_it_is_had(recipe, fails, monkeypatch):
    for name in ("perceptio_hf.training.recipe", "perceptio_hf.training.config"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    line = fails("--config", recipe())
    assert f"Fine-tuning needs the library trl: {how_to_install('train')}" in line
    root = Path(__file__).parents[2]
    assert f'-e "{root}[train]"' in line, "this is a checkout"


def test_a_file_that_ends_too_early_is_no_interruption(recipe, fails, monkeypatch):
    """typer takes EOFError for Ctrl-C."""

    def read(*_):
        raise EOFError("Ran out of input")

    monkeypatch.setattr("perceptio_hf.files.find_recipe", read)
    assert "a file ends too early: Ran out of input" in fails("--config", recipe())


def test_a_damaged_checkpoint_is_named_and_the_training_goes_on_from_the_one_before(tmp_path, recipe, caplog):
    arguments = ["train", "--config", str(recipe(max_steps=3)), "--out", str(tmp_path / "out")]
    assert run(arguments) == 0
    (tmp_path / "out" / "checkpoint").rename(tmp_path / "finished")
    (tmp_path / "out" / "checkpoint-3" / "optimizer.pt").write_bytes(b"")
    assert run(arguments) == 0
    written = caplog.text
    assert "checkpoint-3 cannot be used: optimizer.pt has 0 bytes" in written and "taking checkpoint-2" in written
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]
    PerceptioForConditionalGeneration.from_pretrained(tmp_path / "out" / "checkpoint")


def test_checkpoints_that_nothing_can_go_on_from_are_no_beginning(tmp_path, recipe, fails):
    """With `save_only_model` they are all so: the same command would begin at step 0."""
    arguments = ["--config", recipe(save_only_model=True), "--out", tmp_path / "out"]
    assert run(["train", *map(str, arguments)]) == 0
    (tmp_path / "out" / "checkpoint").rename(tmp_path / "finished")
    line = fails(*arguments)
    assert "checkpoint-2 cannot be used: it holds no state of the optimizer" in line
    assert "save_only_model" in line and "--resume_from_checkpoint false" in line
    assert run(["train", *map(str, arguments), "--resume_from_checkpoint", "false"]) == 0
    assert {path.name for path in (tmp_path / "out").glob("set-aside-*")} == {
        "set-aside-checkpoint-1",
        "set-aside-checkpoint-2",
    }


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_the_best_checkpoint_is_that_of_a_figure_there_is(recipe, samples, tmp_path, fails, dry):
    """Noticed before the steps up to the first evaluation."""
    held = {"eval_tasks": [{"samples": str(samples), "name": "held"}], "eval_strategy": "steps", "eval_steps": 1}
    path = recipe(**held, load_best_model_at_end=True)
    given = ["--config", path, *(dry or ["--out", tmp_path / "out"])]
    assert "metric_for_best_model is 'loss', which no evaluation" in fails(*given)
    assert "there are held_loss." in fails(*given, "--metric_for_best_model", "held_iuo")
    assert run(["train", *map(str, given), "--metric_for_best_model", "eval_held_mask_dice"]) == 0
