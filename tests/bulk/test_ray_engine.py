"""Workers of Ray: equal rows, errors as they are; a worker that dies, or who drives them, loses nothing.

`make test-ray` installs Ray.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from helpers import picture

from perceptio_hf.bulk.engines import Result, open_engine
from perceptio_hf.commands import main

try:
    import ray  # noqa: F401
except ImportError:
    RAY = False
else:
    RAY = True
PATIENCE = 600  # seconds; workers start in a few, but not on a busy machine
needs_ray = pytest.mark.skipif(not RAY, reason="ray[data] is not installed; make test-ray installs it")


def test_without_ray_the_extra_is_named(tmp_path, capsys):
    if RAY:
        pytest.skip("ray is installed")
    picture().save(tmp_path / "a.png")
    assert main.run(["predict", str(tmp_path), "What?", "--engine", "ray", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "--engine ray needs the library ray: pip install" in error
    assert not (tmp_path / "out").exists()


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:port", "127.0.0.1:99999999"])
def test_a_cluster_that_is_not_there(address):
    with pytest.raises(ValueError, match=f"--address {address}: no Ray cluster answers there"):
        list(open_engine("ray", address).run(Sleeper, [[1]]))


class Sleeper:
    """Says which process did the work; refuses 99."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        (self.folder / str(os.getpid())).touch()

    def read(self, batch):
        return batch

    def work(self, batch, read):
        if 99 in batch:
            raise ValueError("99 is too much")
        time.sleep(0.05)
        return [Result({"id": number, "twice": 2 * number}, {"a": b"\0"}) for number in read]


@pytest.fixture(scope="module")
def cluster():
    """One small Ray for the tests of this file: it takes seconds to start."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a file of tests
    engine = open_engine("ray", workers=2)
    with engine._cluster():
        yield engine


class Waiter(Sleeper):
    """Works on nothing before a file called `go` is there."""

    def work(self, batch, read):
        while not (self.folder / "go").exists():
            time.sleep(0.05)
        return [Result({"id": number, "twice": 2 * number}, {"a": b"\0"}) for number in read]


@needs_ray
def test_a_worker_that_is_killed_loses_nothing(cluster, tmp_path):
    killed = []

    def kill_one():
        patience = time.monotonic() + PATIENCE
        while not any(tmp_path.iterdir()) and time.monotonic() < patience:
            time.sleep(0.05)
        time.sleep(0.3)  # it has begun, and waits
        killed.append(int(next(tmp_path.iterdir()).name))
        os.kill(killed[0], signal.SIGKILL)
        (tmp_path / "go").touch()

    batches = [[number, number + 1] for number in range(0, 80, 2)]
    killer = threading.Thread(target=kill_one)
    killer.start()
    results = [result for part in cluster.run(partial(Waiter, str(tmp_path)), batches) for result in part]
    killer.join()
    workers = {path.name for path in tmp_path.iterdir()} - {"go"}
    assert killed and len(workers) >= 2, "another one took its place"
    assert [result.record["id"] for result in results] == list(range(80)), "all of them, once, in order"
    assert results[7].record["twice"] == 14 and results[7].files == {"a": b"\0"}


@needs_ray
def test_errors_are_those_of_the_job(cluster, tmp_path):
    with pytest.raises(ValueError, match=r"^99 is too much$"):
        list(cluster.run(partial(Sleeper, str(tmp_path)), [[1], [99], [3]]))
    with pytest.raises(FileNotFoundError):
        list(cluster.run(partial(Sleeper, str(tmp_path / "missing")), [[1]]))
    assert list(cluster.run(None, [])) == []
    assert len(list(cluster.run(partial(Sleeper, str(tmp_path)), [[1], [2]]))) == 2, "the workers of before are gone"


def photographs(folder: Path, count: int) -> Path:
    """Pictures of several sizes, and a file that is none."""
    folder.mkdir()
    for index in range(count):
        picture(30 + index % 7, 40, seed=index).save(folder / f"{index:02d}.png")
    (folder / "text.png").write_text("no picture")
    return folder


@needs_ray
def test_a_predict_that_is_killed_goes_on_and_ends_with_the_rows_of_one_worker(cluster, tiny_folder, tmp_path, capfd):
    """SIGKILL of the process that drives Ray, in the middle."""
    import psutil  # comes with Ray

    count = 60
    photos = photographs(tmp_path / "photos", count)
    command = ["predict", str(photos), "Which is closer?", "--spatial", "seg+depth", "--model", str(tiny_folder)]
    command += ["--max-new-tokens", "24", "--batch-size", "2"]
    one, two = tmp_path / "one", tmp_path / "two"
    on_ray = [*command, "--engine", "ray", "--out", str(two)]
    with open(tmp_path / "log.txt", "w") as log:
        driver = subprocess.Popen([sys.executable, "-m", "perceptio_hf", *on_ray], stdout=log, stderr=log)
    deadline = time.monotonic() + PATIENCE
    while not lines(two):
        assert driver.poll() is None and time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
        time.sleep(0.01)
    started = [
        each for each in psutil.Process(driver.pid).children(recursive=True) if not each.name().endswith("Agent")
    ]
    driver.kill()
    driver.wait()
    assert 0 < len(lines(two)) < count, "it was killed in the middle"
    _, alive = psutil.wait_procs(started, timeout=PATIENCE)
    assert not alive, "its workers end with it; Ray's agents notice later"

    assert main.run([*on_ray, "--workers", "2"]) == 0
    assert main.run([*command, "--out", str(one)]) == 0
    assert lines(one) == lines(two) and len(lines(one)) == count + 1
    depths = sorted(path.name for path in (one / "depth").iterdir())
    assert depths == sorted(path.name for path in (two / "depth").iterdir()) and len(depths) == count
    assert all((one / "depth" / name).read_bytes() == (two / "depth" / name).read_bytes() for name in depths)
    assert capfd.readouterr().err == "", "Ray keeps quiet"


def lines(folder: Path) -> list[bytes]:
    file = folder / "results.jsonl"
    return file.read_bytes().splitlines() if file.exists() else []


@needs_ray
def test_eval_gives_the_rows_of_one_worker(cluster, tiny_folder, tmp_path, capfd):
    command = ["eval", "world-closest", "--limit", "6", "--replace-depth", "identity,oracle", "--batch-size", "2"]
    command += ["--model", str(tiny_folder), "--max-new-tokens", "24"]
    summaries = []
    for out, options in ((tmp_path / "one", []), (tmp_path / "two", ["--engine", "ray"])):
        assert main.run([*command, *options, "--out", str(out)]) == 0
        summaries.append(json.loads((out / "summary.json").read_text()))
    assert (tmp_path / "one" / "replaced.jsonl").read_bytes() == (tmp_path / "two" / "replaced.jsonl").read_bytes()
    assert summaries[0].pop("time") and summaries[1].pop("time") and summaries[0] == summaries[1]
    assert capfd.readouterr().err == "", "Ray keeps quiet"
