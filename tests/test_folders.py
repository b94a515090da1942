"""Folders appear complete or not at all."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from perceptio_hf.files import check_new_folder, new_folder


def saved(folder, text="old"):
    """Something that looks like a saved model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(text)
    return folder


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_new_folder_with_its_parents(tmp_path):
    target = tmp_path / "a" / "b"
    with new_folder(target) as folder:
        (folder / "config.json").write_text("new")
        assert not target.exists() and folder.parent == target.parent  # same disk: renaming cannot fail half-way
    assert files(tmp_path) == ["a", "a/b", "a/b/config.json"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("new")
    assert files(tmp_path) == ["out", "out/x"]


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_everything_as_it_was(tmp_path, failure, overwrite):
    if overwrite:
        saved(tmp_path / "out")
    before = files(tmp_path)
    with pytest.raises(type(failure)), new_folder(tmp_path / "out", overwrite) as folder:
        (folder / "half").write_text("half")
        raise failure
    assert files(tmp_path) == before


def test_overwriting_replaces_the_whole_folder(tmp_path):
    (saved(tmp_path / "out") / "stale.bin").write_text("old")
    with new_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert files(tmp_path) == ["out", "out/config.json"]
    assert (tmp_path / "out" / "config.json").read_text() == "new"


def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_place(tmp_path):
    saved(tmp_path / "out")
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out", overwrite=True) as folder:
        shutil.rmtree(folder)  # so that the last step fails, after the old folder has been moved away
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert files(tmp_path) == ["out", "out/config.json"]


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    saved(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out exists and is not empty.*--overwrite"), new_folder(tmp_path / "out"):
        raise AssertionError("the block must not run")
    assert files(tmp_path) == ["out", "out/config.json"]


def test_overwriting_spares_what_is_no_model(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"is not replaced: it holds no config\.json"):
        check_new_folder(tmp_path / "thesis", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("target", "source"),
    [
        ("out", "out"),
        ("out", "out/vae.pt"),
        ("out", "out/part/deep"),
        ("out", "part/../out"),
        ("link", "out"),
        ("out", "link/part"),
        ("~/out", "out"),
        ("out", "~/out/part"),
    ],
)
def test_what_is_read_is_never_replaced(tmp_path, monkeypatch, target, source, overwrite):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "out")
    (tmp_path / "out" / "vae.pt").touch()
    (tmp_path / "out" / "part" / "deep").mkdir(parents=True)
    (tmp_path / "part").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    before = files(tmp_path)
    says = r"out (is|holds \S+, which is) to be read; name another folder"  # and nothing of --overwrite
    with pytest.raises(ValueError, match=says if target != "link" else says.replace("out", "link", 1)):
        check_new_folder(target, overwrite, ("part", None, source))
    with pytest.raises(ValueError, match=says), new_folder(target, overwrite, [source]):
        raise AssertionError("the block must not run")
    assert files(tmp_path) == before


def test_what_is_read_elsewhere_is_no_hindrance(tmp_path, monkeypatch):
    saved(tmp_path / "out")
    saved(tmp_path / "out-2")
    (tmp_path / "out" / "part").mkdir()
    monkeypatch.chdir(tmp_path / "out" / "part")  # what "" would be taken for
    check_new_folder(tmp_path / "out", True, ["", None, "owner/name", tmp_path, tmp_path / "out-2"])


def test_what_links_lead_to_is_read_too(tmp_path):
    """A snapshot of the Hub's cache, for example: its files are links into another folder."""
    (saved(tmp_path / "old") / "blob").write_text("weights")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "old" / "blob")
    with pytest.raises(ValueError, match=r"old holds \S+blob, which is to be read"):
        check_new_folder(tmp_path / "old", True, [tmp_path / "snapshot"])
    check_new_folder(tmp_path / "snapshot" / "new", True, [tmp_path / "snapshot"])


def test_what_came_there_meanwhile_stays(tmp_path):
    says = r"out exists and is not empty; .* What was made is in (\S+)\.$"
    with pytest.raises(ValueError, match=says) as error, new_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("new")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("precious")
    kept = str(error.value).rpartition(" ")[2].rstrip(".")
    assert files(tmp_path / "out") == ["thesis.txt"] and files(Path(kept)) == ["config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", Path(kept).name])


def test_folders_that_cannot_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="here is where you are; name a folder in it"):
        check_new_folder(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    check_new_folder(tmp_path / "here")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "here")
    with pytest.raises(ValueError, match="here is a mount; name a folder in it"):
        check_new_folder(tmp_path / "here")


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        check_new_folder(tmp_path / "out", overwrite=True)


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    saved(tmp_path / "disk" / "model")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "model")
    with new_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "model" / "config.json").read_text() == "new"


def test_others_may_read_what_they_may_read_elsewhere(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("x")
    (tmp_path / "plain").mkdir()
    assert os.stat(tmp_path / "out").st_mode == os.stat(tmp_path / "plain").st_mode
