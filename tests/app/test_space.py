"""A Space runs as it is, in a process that has nothing but published libraries."""

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import yaml

from perceptio_hf.commands import main


def test_a_space_has_what_the_hub_asks_for(tmp_path):
    assert main.run(["app", "--space", str(tmp_path / "space")]) == 0
    space = tmp_path / "space"
    metadata = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert metadata["sdk"] == "gradio" and (space / metadata["app_file"]).is_file()
    assert metadata["license"] == "apache-2.0"
    assert len(metadata["short_description"]) <= 60, "the Hub takes no longer one"
    names = [re.match(r"[\w.-]+", line)[0] for line in (space / "requirements.txt").read_text().splitlines()]
    assert {"torch", "transformers", "gradio", "pillow"} <= set(names) and "pytest" not in names
    assert (space / "perceptio_hf" / "tiny" / "config.json").is_file()
    assert not list(space.rglob("__pycache__"))


def test_a_space_holds_the_model_or_names_it(tiny_folder, tmp_path):
    assert main.run(["app", "--model", str(tiny_folder), "--space", str(tmp_path / "own")]) == 0
    assert '"--model", "model"' in (tmp_path / "own" / "app.py").read_text()
    assert (tmp_path / "own" / "model" / "config.json").is_file()
    assert not (tmp_path / "own" / "perceptio_hf" / "tiny").exists()
    assert main.run(["app", "--model", "me/perceptio-1b", "--space", str(tmp_path / "hub")]) == 0
    assert '"--model", "me/perceptio-1b"' in (tmp_path / "hub" / "app.py").read_text()


def test_a_space_takes_no_options_of_serving(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GRADIO_SERVER_PORT", "9001")  # there for every command
    serving = ["--dtype", "bfloat16", "--port", "9000", "--share"]
    assert main.run(["app", "--space", str(tmp_path / "space"), *serving]) == 2
    assert "--dtype and --port and --share are about serving here" in capsys.readouterr().err
    assert not (tmp_path / "space").exists()
    assert main.run(["app", "--space", str(tmp_path / "space")]) == 0


def test_a_space_below_a_training_takes_what_runs_the_model_and_no_more(tiny_folder, tmp_path):
    run = shutil.copytree(tiny_folder, tmp_path / "run")
    for name in ("optimizer.pt", "training_args.bin", ".env"):
        (run / name).touch()
    shutil.copytree(tiny_folder, run / "checkpoint-5")
    (run / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    (run / "LICENSE").write_text("For research.")
    assert main.run(["app", "--model", str(run), "--space", str(run / "space")]) == 0
    names = {path.name for path in (run / "space" / "model").iterdir()}
    assert names == {path.name for path in tiny_folder.iterdir()} | {"README.md", "LICENSE"}
    assert "license" not in yaml.safe_load((run / "space" / "README.md").read_text().split("---")[1])
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["checkpoint-5", "space"]


@pytest.mark.parametrize("limit", [10_000, 100_000], ids=["at the package", "at the weights"])
def test_a_full_disk_leaves_no_half_space(tiny_folder, tmp_path, capsys, limit):
    """No file may grow beyond a limit, which is what a writer sees of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code = main.run(["app", "--model", str(tiny_folder), "--space", str(tmp_path / "space")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and "make room" in said and len(said) < 500
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").touch()
    assert main.run(["app", "--space", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err


def test_without_gradio_one_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in [name for name in sys.modules if name.startswith("perceptio_hf.app.")]:
        monkeypatch.delitem(sys.modules, name)
    assert main.run(["app"]) == 2
    printed = capsys.readouterr().err
    assert "[app]" in printed and printed.count("\n") == 1


def test_the_space_serves_its_page(tmp_path):
    pytest.importorskip("gradio", reason="make test-app installs it")
    space = tmp_path / "space"
    assert main.run(["app", "--space", str(space)]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # The Hub says the port like this.
    environment |= {"GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}/config").read().decode()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.5)
        assert "embedded tiny checkpoint" in page
    finally:
        process.terminate()
        process.wait()
