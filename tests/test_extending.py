"""docs/extending.md: its three diffs, applied to a copy of the package, do what they say."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sft_helpers as sft
import yaml
from helpers import picture, random_model

from perceptio_hf.data.sources import write_samples

ROOT = Path(__file__).parents[1]
DIFFS = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A folder with the package as it is after the three changes."""
    if shutil.which("git") is None:
        pytest.skip("git applies the diffs, and there is none")
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "perceptio_hf", folder / "perceptio_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for number, diff in enumerate(DIFFS):
        patch = folder / f"{number}.diff"
        patch.write_text(diff, encoding="utf-8")
        # A ceiling keeps git from looking for a repository around the folder.
        environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
        done = subprocess.run(["git", "apply", patch.name], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"docs/extending.md, diff {number + 1}: {done.stderr}"
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder, processor = tmp_path_factory.mktemp("model") / "random", sft.processor()
    random_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run(extended: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(extended), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=extended, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_each_change_stays_in_one_file():
    files = [re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE) for diff in DIFFS]
    assert files == [
        ["perceptio_hf/training/losses/parts.py"],
        ["perceptio_hf/evaluation/benchmarks/counting.py"],
        ["perceptio_hf/data/tasks.py"],
    ]


def test_a_new_term_and_a_new_source_train(extended, checkpoint, tmp_path):
    data = write_samples(tmp_path / "balls", [sft.sample(number) for number in (1, 2, 5, 6)])
    picture().save(tmp_path / "a.png")
    (tmp_path / "questions.csv").write_text("picture;question;answer\na.png;Which is closer?;the red ball\n")
    recipe = {
        "model_name_or_path": str(checkpoint),
        "tasks": [{"samples": str(data)}, {"table": str(tmp_path / "questions.csv"), "delimiter": ";"}],
        "order_weight": 0.5,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    run(
        extended,
        *("-m", "perceptio_hf", "train"),
        *("--config", str(tmp_path / "recipe.yaml"), "--out", str(out)),
    )
    history = json.loads(next(out.rglob("trainer_state.json")).read_text())["log_history"]
    assert [entry["order"] > 0 for entry in history if "loss" in entry] == [True, True]
    assert (out / "losses.png").is_file()
    code = """
from perceptio_hf.hub.training_record import read_training
from perceptio_hf.training.config import PerceptioSFTConfig
from perceptio_hf.training.logging import _TITLES
from perceptio_hf.training.losses.parts import parts_table
import sys
assert PerceptioSFTConfig("x", order_weight=0.5, use_cpu=True).loss_weights().order == 0.5
assert _TITLES["order"] == "order of depths: hinge" and "| `order` | 0 | depth maps |" in parts_table()
assert read_training(sys.argv[1]).settings["order_weight"] == 0.5
"""
    run(extended, "-c", code, str(out / "checkpoint"))


def test_a_new_benchmark_is_run_and_reported(extended, checkpoint, tmp_path):
    rows = ["picture,question,count"]
    for number in range(3):
        picture(seed=number).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,How many balls are there?,{number}")
    (tmp_path / "counts.csv").write_text("\n".join(rows) + "\n")
    out = tmp_path / "out"
    perceptio = ("-m", "perceptio_hf")
    options = ("--model", str(checkpoint), "--out", str(out), "--max-new-tokens", "4")
    run(extended, *perceptio, "eval", "counting", "--data", str(tmp_path), *options)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["headline"]["metric"] == "exact" and summary["samples"] == 3
    assert summary["prompt"]["template"] == "{question} Answer with a number."
    report = run(extended, *perceptio, "report", str(out), "--out", str(tmp_path / "report"))
    written = report.stdout + "".join(path.read_text() for path in (tmp_path / "report").rglob("*.md"))
    assert "counting exact counts" in written and "counting counts within one" in written
