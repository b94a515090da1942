"""`perceptio push`: its dry run, its upload, what it prints."""

import json
import shutil

import pytest
import yaml
from hub_server import TOKEN, point_client_at, serve_hub
from huggingface_hub import ModelCard

from perceptio_hf.commands import main

RESULTS = {
    "model-index": [
        {
            "name": "x",
            "results": [
                {
                    "task": {"type": "image-segmentation"},
                    "dataset": {"type": "a/b", "name": "B"},
                    "metrics": [{"type": "ciou", "value": 0.5}],
                }
            ],
        }
    ]
}


def push(*arguments) -> int:
    return main.run(["push", *map(str, arguments)])


def test_a_dry_run_needs_no_network_and_writes_the_card(tiny_folder, tmp_path, capsys):
    (tmp_path / "results.yaml").write_text(yaml.safe_dump(RESULTS))
    options = ("--license", "mit", "--base-model", "x/y", "--base-model", "z/w", "--dataset", "a/b", "--language", "en")
    results = ("--eval-results", tmp_path / "results.yaml")
    assert push(tiny_folder, "me/fine", "--dry-run", tmp_path / "dry", *options, *results, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["uploaded"] is False and document["folder"] == str(tmp_path / "dry")
    assert sorted(path.name for path in (tmp_path / "dry").iterdir()) == document["files"]
    data = ModelCard.load(tmp_path / "dry" / "README.md").data.to_dict()
    assert (data["license"], data["base_model"], data["datasets"]) == ("mit", ["x/y", "z/w"], ["a/b"])
    assert data["model-index"][0]["results"] == RESULTS["model-index"][0]["results"]


def test_a_dry_run_replaces_only_when_told(tiny_folder, tmp_path, capsys):
    for arguments, code in (((), 0), ((), 2), (("--overwrite",), 0)):
        assert push(tiny_folder, "me/fine", "--dry-run", tmp_path / "dry", *arguments) == code
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and "--overwrite" in captured.err
    files = len(list((tmp_path / "dry").iterdir()))
    assert captured.out.count(f"Would upload {files} files to me/fine") == 2


def test_a_dry_run_never_replaces_what_it_reads(tiny_folder, tmp_path, capsys):
    saved = shutil.copytree(tiny_folder, tmp_path / "saved")
    (saved / "optimizer.pt").touch()
    old = shutil.copytree(tiny_folder, tmp_path / "old")
    (old / "results.yaml").write_text(yaml.safe_dump(RESULTS))
    assert push(saved, "me/fine", "--dry-run", saved, "--overwrite") == 2
    assert push(saved, "me/fine", "--dry-run", old, "--overwrite", "--eval-results", old / "results.yaml") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("is to be read; name another folder" in line for line in said)
    assert (saved / "optimizer.pt").is_file() and (old / "results.yaml").is_file()


def test_an_upload_prints_where_it_is_and_never_the_token(tiny_folder, capsys, monkeypatch):
    with serve_hub() as hub:
        point_client_at(monkeypatch, hub.url)
        assert push(tiny_folder, "me/fine", "--token", TOKEN, "--private", "--branch", "v1", "--message", "Mine") == 0
        captured = capsys.readouterr()
        assert f"{hub.url}/me/fine/commit/" in captured.out and TOKEN not in captured.out + captured.err
        repo = hub.repos["me/fine"]
        assert repo.private and set(repo.branches) == {"main", "v1"} and repo.messages == ["Mine"]
        assert push(tiny_folder, "me/fine", "--token", TOKEN[:-1]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("perceptio: ") and TOKEN[:-1] not in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("me/fine", "--overwrite"), "--dry-run"),
        (("fine", "--dry-run", "dry"), "owner/name"),
        (("me/fine", "--dry-run", "dry", "--license", "MIT License"), "licence"),
        (("me/fine", "--dry-run", "dry", "--eval-results", "none.yaml"), "none.yaml"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tiny_folder, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert push(tiny_folder, *arguments) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and says in captured.err
    assert captured.out == "" and list(tmp_path.iterdir()) == []


def test_a_card_of_the_folder_is_kept_and_said(tiny_folder, tmp_path, capsys):
    shutil.copytree(tiny_folder, tmp_path / "saved")
    (tmp_path / "saved" / "README.md").write_text("# By hand\n")
    (tmp_path / "saved" / ".env").write_text("secret")
    assert push(tmp_path / "saved", "me/fine", "--dry-run", tmp_path / "dry") == 0
    out = capsys.readouterr().out
    assert "--new-card" in out and "Left out: .env" in out
    assert (tmp_path / "dry" / "README.md").read_text() == "# By hand\n"
    assert push(tmp_path / "saved", "me/fine", "--dry-run", tmp_path / "new", "--new-card") == 0
    assert "By hand" not in (tmp_path / "new" / "README.md").read_text()
