"""A folder belongs to one process at a time, whatever becomes of that process."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from component_helpers import save_teacher
from helpers import picture

from perceptio_hf.commands.main import run
from perceptio_hf.evaluation.report.hub_results import write_card
from perceptio_hf.files import in_use

pytest.importorskip("fcntl", reason="locks are those of POSIX")
HOLD = """
import sys, time
from perceptio_hf.files import in_use
with in_use(sys.argv[1], "perceptio train"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path / "run"."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def _line(process: subprocess.Popen, folder: Path) -> re.Pattern:
    who = f"process {process.pid} on {re.escape(socket.gethostname())}"
    since = r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    return re.compile(rf"{re.escape(str(folder))} is in use by {who} \(perceptio train, {since}\)\. Wait for it")


def test_the_holder_is_named_and_a_killed_one_holds_nothing(tmp_path, holder):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=_line(holder, folder)), in_use(folder, "evaluation"):
        pass
    holder.kill()
    holder.wait()
    with in_use(folder, "evaluation"), in_use(folder, "evaluation"):  # a process may ask again
        assert f"process {os.getpid()}" in (folder / ".in-use").read_text()
    assert list(folder.iterdir()) == []


def test_two_commands_in_one_folder(tmp_path, holder, capsys):
    folder, config = tmp_path / "run", tmp_path / "recipe.yaml"
    sft = {"model_name_or_path": "tiny", "tasks": [{"world": "plain", "scenes": 1}], "max_steps": 1}
    tiny = {"recipe": "tiny", "codec": {"image_size": 128, "downsample": 16}}
    for command, recipe in (("train", sft), ("train", tiny), ("eval", None)):
        config.write_text(yaml.safe_dump(recipe))
        what = ["--config", str(config)] if recipe else ["world-plain", "--limit", "1"]
        assert run([command, *what, "--out", str(folder)]) == 2
        captured = capsys.readouterr()
        assert _line(holder, folder).search(captured.err) and len(captured.err.splitlines()) == 1 and not captured.out
    assert [path.name for path in folder.iterdir()] == [".in-use"]


def test_labels_and_codecs_of_two_commands(tmp_path, holder, capsys):
    folder, kept = tmp_path / "run", tmp_path / "run.training"
    save_teacher(tmp_path / "teacher")
    picture().save(tmp_path / "a.png")
    teacher = ["--teacher", str(tmp_path / "teacher")]
    capsys.readouterr()
    assert run(["label", str(tmp_path / "a.png"), *teacher, "--depth-codec", "tiny", "--out", str(folder)]) == 2
    captured = capsys.readouterr()
    assert _line(holder, folder).search(captured.err) and len(captured.err.splitlines()) == 1 and not captured.out
    folder.rename(kept)  # whoever holds it holds it still
    assert run(["codebook", "train", "--maps", "1", "--steps", "1", "--out", str(folder)]) == 2
    assert _line(holder, kept).search(capsys.readouterr().err) and not folder.exists()
    assert [path.name for path in kept.iterdir()] == [".in-use"]


ADD = """
import json, sys
from pathlib import Path
from perceptio_hf.evaluation.report.hub_results import write_card
summary = json.loads(sys.argv[2])
for split in range(8):
    write_card(Path(sys.argv[1]), summary | {"split": f"{sys.argv[3]}-{split}"})
"""


def test_two_evaluations_write_one_card(tmp_path):
    summary = {"benchmark": "ai2d", "task": "multiple_choice", "samples": 1, "split": "first", "data": {}}
    summary |= {"generation": {"spatial": "none"}, "model": {"name": "m", "weights_sha256": "0"}}
    summary["scores"] = {"accuracy": 0.5}
    card = tmp_path / "card.yaml"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    commands = [[sys.executable, "-c", ADD, str(card), json.dumps(summary), name] for name in "ab"]
    processes = [subprocess.Popen(command, env=environment) for command in commands]
    assert [process.wait() for process in processes] == [0, 0]
    write_card(card, summary)
    assert len(yaml.safe_load(card.read_text())["model-index"][0]["results"]) == 17
