"""benchmarks/gpu.py, which may not be run for months: all parts on the CPU, tiny, and what it does about trouble."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
# What needs something that is not everywhere.
MAY_FAIL = set() if importlib.util.find_spec("perceptio_hf.training.planning") else {"memory"}


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    path = sys.path.copy()
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


def run(out: Path, *options: str) -> dict:
    command = [
        sys.executable,
        str(BENCHMARK),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--quick",
        "--minutes",
        "30",
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads((out / "gpu.json").read_text())
    assert [path.name for path in out.iterdir()] == ["gpu.json"]
    assert all(name in done.stdout for name in document["parts"]), "the table names every part"
    return document


@pytest.mark.slow
def test_every_part_runs(tmp_path, gpu):
    parts = run(tmp_path)["parts"]
    assert list(parts) == list(gpu.ORDER)
    troubled = {name: part for name, part in parts.items() if part["state"] != "done" and name not in MAY_FAIL}
    assert troubled == {}
    errors = {
        f"{name}, {case}": figures["error"]
        for name, part in parts.items()
        for case, figures in part["cases"].items()
        if "error" in figures and name not in MAY_FAIL
    }
    assert errors == {}
    tiny = parts["generation_tiny"]["cases"]
    assert tiny["float32, prompts one by one"]["same"] == tiny["float32, prompts one by one"]["of"] == 1
    ways = parts["compiled"]["cases"]
    assert all(case["same_ids"] for case in ways.values())
    assert all(case["same_ids"] for case in parts["compiled_tiny"]["cases"].values())
    assert ways["bfloat16, parallel, static, CUDA graphs"]["graphs_after_the_second_call"] == 0
    assert all(case["same_ids"] for case in parts["device_map"]["cases"].values())
    assert parts["fsdp"]["cases"]["full, bfloat16, float32 weights"]["sharded"] > 0


def test_parts_that_fail_or_hang_or_no_longer_fit_hinder_no_other(tmp_path, gpu, capsys):
    def fails(setup, record):
        with record.case("good") as figures:
            figures["value"] = 1
        with record.case("bad"):
            raise RuntimeError("no such kernel")
        raise RuntimeError("the device is gone")

    def hangs(setup, record):
        record.add("before", value=2)
        assert (tmp_path / "hangs.partial.json").exists()
        record.add("kept", value=3)
        time.sleep(60)

    from gpu_parts.tools import PARTS, Part, Setup

    setup, limits = Setup(gpu.torch.device("cpu"), quick=False), (gpu.SLACK, gpu.GRACE)
    parts = {"fails": Part(10.0, fails), "hangs": Part(0.0, hangs), "long": Part(1e6, hangs), "last": Part(10.0, fails)}
    before = dict(PARTS)
    PARTS.clear(), PARTS.update(parts)
    gpu.SLACK, gpu.GRACE = 1.0, 0.5
    try:
        names = ["fails", "unknown", "hangs", "long", "last"]
        document = gpu.run_all(names, setup, 2.0, tmp_path, ["its traceback"])
    finally:
        gpu.SLACK, gpu.GRACE = limits
        PARTS.clear(), PARTS.update(before)
    found = document["parts"]
    assert {name: part["state"] for name, part in found.items()} == {
        "fails": "failed",
        "unknown": "failed",
        "hangs": "stopped",
        "long": "left out",
        "last": "failed",
    }
    assert found["fails"]["cases"]["good"]["value"] == 1 and "no such kernel" in found["fails"]["cases"]["bad"]["error"]
    assert "the device is gone" in "\n".join(found["fails"]["log"]) and found["unknown"]["log"] == ["its traceback"]
    assert found["hangs"]["cases"] == {"before": {"value": 2}, "kept": {"value": 3}}, "they lie in OUT while it runs"
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
    assert json.loads((tmp_path / "gpu.json").read_text()) == document
    assert "the device is gone" in gpu.table(document)


def test_what_needs_no_gpu_runs_beside_the_parts_on_one(tmp_path, gpu, monkeypatch):
    """The first part on the device waits until the one beside it has begun, and that one until the other has ended."""
    from gpu_parts.tools import PARTS, Part, Setup

    class OnCuda(Setup):
        is_cuda = True

    def until(path: Path) -> float:
        begun = time.monotonic()
        while not path.exists():
            assert time.monotonic() - begun < 30, f"{path.name} did not come"
            time.sleep(0.01)
        return time.monotonic() - begun

    def on_device(setup, record):
        until(tmp_path / "host.partial.json")
        record.add("ended", cuda=setup.is_cuda)
        time.sleep(0.5)  # what it wrote goes with it

    def on_host(setup, record):
        record.add("begun", cuda=setup.is_cuda, visible=os.environ["CUDA_VISIBLE_DEVICES"])
        until(tmp_path / "last.partial.json")

    def hangs(setup, record):
        record.add("begun")
        time.sleep(60)

    parts = {"host": Part(1.0, on_host, True), "first": Part(1.0, on_device), "last": Part(1.0, on_device)}
    before = dict(PARTS)
    PARTS.clear(), PARTS.update(parts)
    monkeypatch.setattr(gpu, "run_part", lambda name, setup, path: PARTS[name].run(setup, gpu.Record(path)))
    try:
        document = gpu.run_all(list(parts), OnCuda(gpu.torch.device("cpu"), quick=False), 1.0, tmp_path, [])
        assert list(document["parts"]) == list(parts), "in their order, however they end"
        assert {part["state"] for part in document["parts"].values()} == {"done"}
        assert document["parts"]["host"]["cases"]["begun"] == {"cuda": False, "visible": ""}
        assert document["parts"]["last"]["cases"]["ended"] == {"cuda": True}
        PARTS["host"] = Part(1.0, hangs, True)
        monkeypatch.setattr(gpu, "GRACE", 0.5)
        document = gpu.run_all(list(parts), OnCuda(gpu.torch.device("cpu"), quick=False), 0.05, tmp_path, [])
        assert document["parts"]["host"]["state"] == "stopped", "no longer than all are given"
    finally:
        PARTS.clear(), PARTS.update(before)
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_a_part_begins_from_nothing_where_the_fork_is_bad(tmp_path):
    """What a forked process does when something has started CUDA before: it becomes this command."""
    path = tmp_path / "grammar.json"
    command = [sys.executable, str(BENCHMARK), "--part", "grammar", str(path), "--device", "cpu", "--quick"]
    assert subprocess.run(command, timeout=120).returncode == 0
    assert "2 rows x 800" in json.loads(path.read_text())


def test_an_unknown_part_is_named(tmp_path, gpu, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), "--only", "grammer", "--out", str(tmp_path), "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2 and "grammer" in capsys.readouterr().err
