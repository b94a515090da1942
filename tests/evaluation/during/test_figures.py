"""Figures while a model trains: those of `perceptio eval`, among the metrics, and for the best checkpoint."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest
import sft_helpers as sft
import torch
from helpers import random_model
from transformers import EarlyStoppingCallback

from perceptio_hf.commands.main import run
from perceptio_hf.evaluation.benchmarks import open_benchmark
from perceptio_hf.evaluation.during.figures import HeldOutFigures
from perceptio_hf.evaluation.during.trackers import TrainerFigures
from perceptio_hf.evaluation.run.runner import RunSettings, run_benchmark
from perceptio_hf.evaluation.run.scoring import total_scores

SETS = [
    {"benchmark": "world-refer", "limit": 2, "cases": 1},
    {"benchmark": "world-depth", "limit": 2, "cases": 0},
    {"broken_spans": 3},
]


@pytest.fixture(scope="module")
def parts():
    processor = sft.processor()
    return random_model(processor), processor


@pytest.fixture(scope="module")
def held_out():
    return HeldOutFigures(SETS, batch_size=2)


def test_figures_are_those_of_perceptio_eval(parts, held_out, tmp_path):
    model, processor = parts
    model.train()
    before = torch.random.get_rng_state()
    figures, pictures = held_out.measure(model, processor)
    assert model.training and torch.equal(torch.random.get_rng_state(), before)
    assert list(pictures) == ["world-refer"]
    model.eval()
    for name in ("world-refer", "world-depth"):
        benchmark = open_benchmark(name, limit=2)
        settings = RunSettings(spatial=benchmark.spatial, batch_size=2)
        done = run_benchmark(model, processor, benchmark, tmp_path / name, settings, weights="x")
        expected = {f"{name}_{key}": value for key, value in total_scores(benchmark.task, done.records).items()}
        own = {key: value for key, value in figures.items() if key.startswith(name)}
        assert own == pytest.approx({key: expected[key] for key in own})
    assert {"world-refer_ciou", "world-depth_absrel", "world-depth_delta1"} <= set(figures)
    assert 0 <= figures["broken_spans"] <= 1 and len(figures) > 5
    assert held_out.measure(model, processor)[0]["broken_spans"] == figures["broken_spans"]


@pytest.mark.parametrize("sets", [0, 1])
def test_the_best_checkpoint_is_that_of_a_figure(parts, tmp_path, sets):
    """A figure that falls at step 2 ends the training early; the first checkpoint is the best, and is loaded."""
    trainer = sft.trainer(
        tmp_path,
        processor=parts[1],
        evaluation={f"set{number}": sft.samples(2) for number in range(sets)},
        max_steps=6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="right",
        greater_is_better=True,
        load_best_model_at_end=True,
    )
    trainer.figures = lambda trainer, model: {"right": 1 / trainer.state.global_step}
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"
    assert [entry["eval_right"] for entry in trainer.state.log_history if "eval_right" in entry] == [1, 0.5]


def test_a_recipe_lists_figures(parts, tmp_path, capsys):
    model, processor = parts
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    text = (
        f"model_name_or_path: {tmp_path / 'model'}\ntasks: [{{world: plain, scenes: 2, size: 48}}]\nmax_steps: 1\n"
        "per_device_train_batch_size: 2\nbf16: false\ngradient_checkpointing: false\nreport_to: none\n"
        "save_strategy: 'no'\nplot_losses: false\ndisable_tqdm: true\n"
        "figures: [{benchmark: world-refer, limit: 2, cases: 1}]\n"
    )
    recipe.write_text(text)
    arguments = ["train", "--config", str(recipe), "--out", str(tmp_path / "out")]
    assert run(arguments) == 2 and "set eval_strategy: steps" in capsys.readouterr().err
    recipe.write_text(text + "eval_strategy: steps\neval_steps: 1\n")
    assert run(arguments) == 0
    assert "eval_world-refer_ciou" in capsys.readouterr().out
    assert (tmp_path / "out" / "figures" / "world-refer-1.png").stat().st_size > 1000


def test_figures_leave_the_losses_to_the_next_log(parts, tmp_path):
    """What is logged in training takes the parts of the loss since the last time along."""
    options = {"processor": parts[1], "max_steps": 3, "logging_steps": 3}
    plain = sft.trainer(tmp_path / "plain", **options)
    plain.train()
    trainer = sft.trainer(tmp_path / "figures", evaluation={}, eval_strategy="steps", eval_steps=2, **options)
    trainer.figures = lambda trainer, model: {"right": 1.0}
    trainer.train()
    figures, _, losses = sorted(trainer.state.log_history[:3], key=lambda entry: (entry["step"], "loss" in entry))
    assert set(figures) == {"eval_right", "step", "epoch"}
    assert losses["text"] == pytest.approx(plain.state.log_history[0]["text"])
    assert losses["mask_dice"] == pytest.approx(plain.state.log_history[0]["mask_dice"])


def test_spans_are_sampled_at_temperature_one(parts):
    model, processor = parts
    assert model.generation_config.temperature in (None, 1.0)
    held_out = HeldOutFigures([{"benchmark": "world-depth", "limit": 2, "cases": 0}, {"broken_spans": 8}])
    expected = held_out.measure(model, processor)[0]["broken_spans_count_mae"]
    model.generation_config.temperature = 9.0
    try:
        assert held_out.measure(model, processor)[0]["broken_spans_count_mae"] == expected
    finally:
        model.generation_config.temperature = None


def test_tensorboard_gets_figures_and_pictures(parts, held_out, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="the extra `track` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "report_to": "tensorboard"}
    trainer = sft.trainer(tmp_path, processor=parts[1], evaluation={}, **options)
    trainer.figures = TrainerFigures(held_out)
    trainer.train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert "cases/world-refer" in board.Tags()["images"]
    assert {"eval/world-refer_ciou", "eval/broken_spans"} <= set(board.Tags()["scalars"])
    assert json.dumps(trainer.state.log_history)


REPORTED = """
import sys
import sft_helpers as sft
from perceptio_hf.evaluation.during.figures import HeldOutFigures
from perceptio_hf.evaluation.during.trackers import TrainerFigures
options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "report_to": sys.argv[2], "project": "one"}
trainer = sft.trainer(sys.argv[1], evaluation={}, **options)
trainer.figures = TrainerFigures(HeldOutFigures([{"benchmark": "world-refer", "limit": 2, "cases": 1}]))
trainer.train()
"""


def train_reporting_to(name: str, out: Path, **variables: str) -> None:
    """In a process of its own: wandb writes its log when that ends, and trackio asks where to write when it begins."""
    if find_spec(name) is None:
        pytest.skip("the extra `track` is not installed")
    tests = Path(__file__).parents[2]
    paths = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths} | variables
    subprocess.run([sys.executable, "-c", REPORTED, str(out), name], env=environment, check=True, timeout=300)


def test_weights_and_biases_gets_figures_and_pictures(tmp_path):
    train_reporting_to("wandb", tmp_path / "out", WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    for logged in (b"eval/world-refer_ciou", b"cases/world-refer", b"train/loss"):
        assert logged in log.read_bytes()
    drawn = list(log.parent.glob("files/media/images/cases/world-refer*.png"))
    assert drawn and all(picture.stat().st_size > 1000 for picture in drawn)


def test_trackio_gets_figures_and_pictures(tmp_path):
    train_reporting_to("trackio", tmp_path / "out", TRACKIO_DIR=str(tmp_path / "trackio"))
    with closing(sqlite3.connect(tmp_path / "trackio" / "one.db")) as board:
        logged = [json.loads(row[0]) for row in board.execute("select metrics from metrics")]
    assert any("eval/world-refer_ciou" in entry for entry in logged) and any("train/loss" in entry for entry in logged)
    shown = [entry["cases/world-refer"]["file_path"] for entry in logged if "cases/world-refer" in entry]
    assert shown and all((tmp_path / "trackio" / "media" / path).stat().st_size > 1000 for path in shown)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([{"benchmark": "world-closer"}], "world-closest"),
        ([{"benchmark": "world-refer", "limits": 2}], "did you mean limit"),
        ([{"benchmark": "world-refer", "limit": 2}, {"broken_spans": 4}], "no benchmark that asks for depth"),
        ([{"broken_spans": -1}], "broken_spans is -1; sample one response or more"),
        ([{"benchmark": "world-refer", "limit": 2}] * 2, "world-refer is there twice"),
        (["world-refer"], "expected keys with benchmark among them"),
    ],
)
def test_mistakes_are_named(sets, message):
    with pytest.raises(ValueError, match=message):
        HeldOutFigures(sets)
