"""Workers of Ray: equal rows, errors as they are; a worker that dies, or who drives them, loses nothing.

`make test-ray` installs Ray.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from helpers import picture

from perceptio_hf.bulk import progress
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


class Deadly(Sleeper):
    """Ends its process, as a decoder's crash would: at 99, or when it is opened."""

    def __init__(self, folder: str, opening: bool):
        super().__init__(folder)
        if opening:
            os._exit(1)

    def work(self, batch, read):
        if 99 in batch:
            os._exit(1)
        return super().work(batch, read)


@needs_ray
@pytest.mark.parametrize(
    ("opening", "message"),
    [
        (
            True,
            r"^The processes of Ray's workers ended 3 times each before they had done anything; .*--workers may help.$",
        ),
        (
            False,
            r"^3 processes of Ray's ended over 98, 99\. Where memory is short, a smaller --batch-size may help; .*on.$",
        ),
    ],
)
def test_what_ends_every_worker_is_not_tried_for_ever(cluster, tmp_path, opening, message):
    batches, done = [[number] for number in range(6)] + [[98, 99]], []
    with pytest.raises(ValueError, match=message):
        for results in cluster.run(partial(Deadly, str(tmp_path), opening), batches):
            done += results
    assert 2 < len(list(tmp_path.iterdir())) < 12
    assert [result.record["id"] for result in done] == ([] if opening else list(range(6)))


@dataclass(frozen=True)
class Picture:
    file: str


class Opener(Sleeper):
    def work(self, batch, read):
        return [Result({"id": item.file}) for item in batch]


@needs_ray
def test_a_file_that_a_workers_machine_lacks_is_no_failure_of_its_item(cluster, tmp_path):
    job, everywhere, nowhere = partial(Opener, str(tmp_path)), Picture(str(tmp_path)), Picture(str(tmp_path / "none"))
    assert len(list(cluster.run(job, [[everywhere, nowhere]]))) == 1, "no machine has it: that is the item's own fault"
    here_alone = Picture(f"/proc/self/task/{os.getpid()}")  # each process sees its own threads there
    with pytest.raises(ValueError, match=rf"^{here_alone.file} is not on the machine {socket.gethostname()}, where a"):
        list(cluster.run(job, [[everywhere], [here_alone]]))


class Counter(Sleeper):
    """Says how many processors Ray has given to it, which are its threads where OMP_NUM_THREADS says nothing else."""

    def work(self, batch, read):
        import ray

        return [Result({"id": ray.get_runtime_context().get_assigned_resources()["CPU"]}) for _ in batch]


@needs_ray
def test_workers_share_the_processors_of_one_machine(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "workers", 1)
    found = [
        result.record["id"] for part in cluster.run(partial(Counter, str(tmp_path)), [[1], [2]]) for result in part
    ]
    assert found == [max(os.cpu_count(), 2)] * 2
    few, gpus, cluster_of_two = {"CPU": 6.0}, {"CPU": 8.0, "GPU": 4.0}, 2
    for device, workers, resources, machines, expected in (
        (None, 2, few, 1, (2, {"num_cpus": 3})),
        (None, 2, few, cluster_of_two, (2, {"num_cpus": 1})),
        (None, None, gpus, cluster_of_two, (4, {"num_gpus": 1})),
        ("cpu", None, gpus, 1, (1, {"num_cpus": 8})),
        ("cuda", 3, gpus, 1, (3, {"num_gpus": 1})),
    ):
        assert open_engine("ray", None, workers, device)._share(resources, machines, 100) == expected
    for device, workers, resources, message in (
        ("cuda", None, few, "Ray has no GPU"),
        (None, 5, gpus, "Ray has 4 GPUs"),
        (None, 7, few, "Ray has 6 processors"),
    ):
        with pytest.raises(ValueError, match=message):
            open_engine("ray", None, workers, device)._share(resources, 1, 100)
    with pytest.raises(ValueError, match="a worker of Ray sees its own GPU alone; name cpu, cuda, mps, or none"):
        open_engine("ray", device="cuda:1")


@needs_ray
def test_the_variable_of_ray_names_a_cluster(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ValueError, match=r"RAY_ADDRESS=127.0.0.1:1: no Ray cluster answers there"):
        open_engine("ray")._check_address()
    with pytest.raises(ValueError, match=r"--address 127.0.0.1:2: no Ray cluster answers there"):
        open_engine("ray", "127.0.0.1:2")._check_address()


@needs_ray
def test_who_waits_is_told_for_what(cluster, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("perceptio_hf.bulk.ray_engine._PATIENCE", 0.5)
    threading.Timer(3, (tmp_path / "go").touch).start()
    list(cluster.run(partial(Waiter, str(tmp_path)), [[1], [2]]))
    (line,) = capfd.readouterr().err.splitlines()
    assert "no result of Ray's for 0.5 seconds" in line and "2 of them ask for 1 CPU each; " in line


def test_a_parcel_holds_few_pictures_where_batches_are_large():
    from perceptio_hf.bulk.ray_engine import _parcels

    small, large = [[0] * 4] * 200, [[0] * 48] * 20
    assert [len(parcel) for parcel in _parcels(small, 2)] == [8] * 25
    assert [len(parcel) for parcel in _parcels(large, 2)] == [1] * 20


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
def test_a_predict_that_is_killed_goes_on_and_ends_with_the_rows_of_one_worker(
    cluster, tiny_folder, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(progress, "LOGGED_EVERY", 3600.0)  # a slow machine is told how far it is
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
def test_eval_gives_the_rows_of_one_worker(cluster, tiny_folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(progress, "LOGGED_EVERY", 3600.0)  # a slow machine is told how far it is
    command = ["eval", "world-closest", "--limit", "6", "--replace-depth", "identity,oracle", "--batch-size", "2"]
    command += ["--model", str(tiny_folder), "--max-new-tokens", "24"]
    summaries = []
    for out, options in ((tmp_path / "one", []), (tmp_path / "two", ["--engine", "ray"])):
        assert main.run([*command, *options, "--out", str(out)]) == 0
        summaries.append(json.loads((out / "summary.json").read_text()))
    assert (tmp_path / "one" / "replaced.jsonl").read_bytes() == (tmp_path / "two" / "replaced.jsonl").read_bytes()
    assert summaries[0].pop("time") and summaries[1].pop("time") and summaries[0] == summaries[1]
    assert capfd.readouterr().err == "", "Ray keeps quiet"
