"""Labels by workers of Ray: the rows of one process, also when a worker is killed. `make test-ray` installs Ray."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from helpers import picture

from perceptio_hf.labelling.labels import read_rows

pytest.importorskip("ray", reason="ray[data] is not installed; make test-ray installs it")


def workers_of_ray() -> list[int]:
    """Processes that hold a worker of ours, of the Ray that this process started."""
    found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [process for process in found if b"_RayWorker" in _read(process, "cmdline") and _is_below(process)]


def _is_below(process: int) -> bool:
    while process > 1:
        process = int((_read(process, "stat").rpartition(b") ")[2].split() or [b"0", b"0"])[1])
        if process == os.getpid():
            return True
    return False


def _read(process: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{process}/{name}").read_bytes()
    except OSError:  # it has just ended
        return b""


def test_two_workers_of_which_one_is_killed_give_the_rows_of_one_process(label, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(60):
        picture(60, 40 + index % 3, seed=index).save(photos / f"{index:02d}.png")
    (photos / "bad.png").write_text("no picture")
    assert label(photos, "--out", tmp_path / "one", "--maps", "--batch-size", 2)[0] == 0
    killed = []

    def kill_one():
        journal, patience = tmp_path / "two" / "journal" / "labels.jsonl", time.monotonic() + 120
        while time.monotonic() < patience and not (journal.exists() and journal.stat().st_size):
            time.sleep(0.02)
        for process in workers_of_ray()[:1]:
            os.kill(process, signal.SIGKILL)
            killed.append(process)

    killer = threading.Thread(target=kill_one)
    killer.start()
    words = ["--maps", "--batch-size", 2, "--engine", "ray", "--workers", 2]
    code, said, error = label(photos, "--out", tmp_path / "two", *words)
    killer.join()
    assert code == 0, error
    assert killed and said["labelled"] == 60 and said["failed"] == 1
    assert read_rows(tmp_path / "one").to_list() == read_rows(tmp_path / "two").to_list()
    for path in (tmp_path / "one" / "depth").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
