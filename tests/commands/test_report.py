"""`perceptio report`: runs of `perceptio eval` as one table."""

import json

import pytest

from perceptio_hf.commands import main


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("world-plain", "world-depth"):
        options = ["--limit", "2", "--max-new-tokens", "24", "--out", str(folder / name)]
        assert main.run(["eval", name, "--model", str(tiny_folder), *options]) == 0
    return folder


def test_table_and_plot_of_a_folder_of_runs(runs, tmp_path, capsys):
    assert main.run(["report", str(runs), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert "world-plain accuracy" in text and "world-depth AbsRel" in text
    assert (tmp_path / "out" / "report.png").stat().st_size > 5000


def test_json_has_the_same_rows(runs, tmp_path, capsys):
    assert main.run(["report", str(runs / "world-plain"), "--out", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    summary = json.loads((runs / "world-plain" / "summary.json").read_text())
    row = document["rows"][f"{summary['model']['name']}, first 2 samples"]
    assert {item["metric"]: item["value"] for item in row}["accuracy"] == summary["scores"]["accuracy"]
    assert "chance" in document["rows"] and document["published"] == {}


def test_an_unfinished_run_is_no_run(tmp_path, capsys):
    assert main.run(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no summary.json" in capsys.readouterr().err and not (tmp_path / "out").exists()
