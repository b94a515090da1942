"""A file appears complete or not at all."""

import json
from pathlib import Path

import pytest
from PIL import Image

import perceptio_hf
from perceptio_hf.files import expanded, files_below, out_file, replacing, write_json, write_picture


def test_a_failure_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "answer.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["answer.json"]


def test_an_old_file_is_replaced(tmp_path):
    path = tmp_path / "picture.png"
    for size in ((2, 3), (4, 5)):
        write_picture(path, Image.new("RGB", size))
    assert Image.open(path).size == (4, 5)


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        write_json(tmp_path / "nowhere" / "a.json", {})


def test_links_to_folders_are_followed_once(tmp_path):
    """As data sets on several disks are gathered in one folder; a link that leads back to above is no end."""
    for name in ("disk/refcoco/a", "disk/refcocog/b", "refs/own/c", "refs/.git/d"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / "refs" / "refcoco").symlink_to(tmp_path / "disk" / "refcoco")
    (tmp_path / "refs" / "own" / "refcocog").symlink_to(tmp_path / "disk" / "refcocog")
    (tmp_path / "refs" / "own" / "back").symlink_to(tmp_path / "refs")
    (tmp_path / "refs" / "again").symlink_to(tmp_path / "refs" / "own")
    (tmp_path / "refs" / "own" / "later").symlink_to(tmp_path / "refs" / "refcoco")
    assert sorted(path.name for path in files_below(tmp_path / "refs")) == ["a", "b", "c"]


def test_a_name_that_only_begins_like_a_home_folder_is_a_name(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/somebody")
    assert expanded("~/a.png") == Path("/home/of/somebody/a.png")
    assert expanded("~1.jpg") == Path("~1.jpg")  # pathlib raises RuntimeError: there is no such user
    sources = Path(perceptio_hf.__file__).parent.rglob("*.py")
    assert [str(path) for path in sources if ".expanduser()" in path.read_text(encoding="utf-8")] == []


def test_the_folder_of_a_result_is_there_before_the_work(tmp_path):
    path = out_file(str(tmp_path / "not" / "there" / "yet.json"))
    write_json(path, {"figure": 1})
    assert out_file(str(path)).read_text() == path.read_text()


def test_every_benchmark_makes_the_folder_of_its_result():
    """Or one would lose the work of half an hour at its end."""
    folder = Path(__file__).parents[1] / "benchmarks"
    # Of folders, or made there, since these run with older checkouts too.
    own = {"gpu.py", "rehearse.py", "original_models.py", "train_throughput.py", "large.py"}
    asked = {
        path.name: line
        for path in folder.glob("*.py")
        for line in path.read_text().splitlines()
        if '"--out", ' in line and "add_argument" in line
    }
    assert own < set(asked)
    assert [name for name, line in asked.items() if name not in own and "type=out_file" not in line] == []
