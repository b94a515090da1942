"""Runs side by side: rows, published figures marked as such, text and plot."""

import copy
import json

import pytest
from PIL import Image

from perceptio_hf.evaluation.report.comparison import compare, read_summaries
from perceptio_hf.evaluation.report.published import PUBLISHED, PUBLISHED_REPLACEMENTS
from perceptio_hf.evaluation.report.text import markdown, run_text, write_report


def summary(
    benchmark="refcoco", task="referring_segmentation", split="val", name="mine", digest="ab", **scores
) -> dict:
    return {
        "format": 1,
        "benchmark": benchmark,
        "task": task,
        "split": split,
        "samples": 10,
        "headline": {"metric": next(iter(scores)), "value": next(iter(scores.values()))},
        "scores": scores,
        "baselines": {},
        "replacement": None,
        "model": {"name": name, "weights_sha256": digest * 32, "parameters": 1, "dtype": "float32", "device": "cpu"},
        "data": {"path": None, "sha256": "cd" * 32, "limit": None},
        "left_out": [],
        "generation": {"spatial": "seg", "max_new_tokens": 9, "decoding": "greedy", "batch_size": 8},
        "time": {"samples_per_second": 2.5},
    }


def points(**scores) -> dict:
    found = summary("hardblink", "relative_depth", "all", **scores)
    found["baselines"] = {"chance": {"accuracy": 0.29, "accuracy_3": 1 / 3}, "majority": {"accuracy": 0.35}}
    found["replacement"] = {
        "samples": 10,
        "without_span": 2,
        "own": 0.5,
        "chance": 0.29,
        "content_points": 12.5,
        "content_share": 0.6,
        "replacements": {
            "identity": {"accuracy": 0.5, "changed": 0.0, "points": 0.0, "points_interval": [0, 0]},
            "random": {"accuracy": 0.375, "changed": 0.4, "points": -12.5, "points_interval": [-30.0, 5.0]},
        },
        "published": {"source": "S", "accuracy_percent": PUBLISHED_REPLACEMENTS},
    }
    return found


def row(text: str, start: str) -> list[str]:
    """The cells of the table's row with this first cell."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line[1:-1].split("|")]


def test_one_model_on_several_benchmarks_is_one_row():
    table = compare([summary(ciou=0.5, giou=0.4), summary("refcoco+", ciou=0.3, giou=0.2)])
    assert [column[0] for column in table.columns] == ["refcoco", "refcoco", "refcoco+", "refcoco+"]
    assert list(table.rows["mine"].values()) == [0.5, 0.4, 0.3, 0.2]


def test_runs_that_differ_in_weights_or_spans_are_told_apart():
    other = summary(digest="ef", ciou=0.6)
    forced = copy.deepcopy(summary(ciou=0.7))
    forced["generation"]["spatial"] = "seg+depth"
    elsewhere = summary("refcoco+", ciou=0.1)
    table = compare([summary(ciou=0.5), other, forced, summary(ciou=0.4), elsewhere])
    labels = [label for label in table.rows if not label.endswith("(published)")]
    mine = "mine [abababab], spatial"
    rows = [f"{mine} seg, run 1", "mine [efefefef]", f"{mine} seg+depth", f"{mine} seg, run 2", f"{mine} seg"]
    assert labels == rows, "a model that was asked in two ways says in every row in which"
    assert list(table.rows[labels[3]].values()) == [0.4] and list(table.rows[labels[4]].values()) == [0.1]


def test_a_run_over_a_part_of_the_data_says_so_and_chance_is_of_most_samples():
    whole, part = copy.deepcopy(points(accuracy=0.3)), copy.deepcopy(points(accuracy=1.0))
    whole["baselines"], part["baselines"] = {"chance": {"accuracy": 0.26}}, {"chance": {"accuracy": 0.33}}
    part["samples"], part["data"]["limit"] = 3, 3
    for runs in ([whole, part], [part, whole]):
        table = compare(runs)
        column = table.columns[0]
        assert table.rows["mine"][column] == 0.3 and table.rows["mine, first 3 samples"][column] == 1.0
        assert table.rows["chance"][column] == 0.26


def test_published_rows_are_marked_and_have_sources():
    text = markdown([summary(ciou=0.5), summary("mmbench", "multiple_choice", "dev", circular_accuracy=0.25)])
    assert row(text, "mine") == ["mine", "50.0", "25.0"]
    assert row(text, "Perceptio-8B (published)") == ["Perceptio-8B (published)", "82.7", "83.4"]
    assert row(text, "Sa2VA-8B (published)")[1:] == ["81.6", "81.6"]
    assert "AURORA" not in text, "nothing of it fits these benchmarks"
    assert "- Perceptio-8B (published): Li et al. 2026, arXiv 2603.18795" in text
    published = [line for line in text.splitlines() if line.startswith("|") and "8B" in line]
    assert all("(published)" in line for line in published)


def test_figures_of_another_split_stay_away():
    assert "82.7" not in markdown([summary(split="testA", ciou=0.5)])


def test_a_published_mean_needs_all_its_sets_of_points():
    some = markdown([points(accuracy=0.3, accuracy_3=0.4, accuracy_4=0.2)])
    assert row(some, "LLaVA-AURORA (13B) (published)")[1:] == ["", "66.9", "60.5"]
    every = markdown([points(accuracy=0.3, accuracy_3=0.4, accuracy_4=0.2, accuracy_5=0.1)])
    assert row(every, "LLaVA-AURORA (13B) (published)")[1:] == ["60.7", "66.9", "60.5", "54.8"]
    one = copy.deepcopy(points(accuracy=0.3, accuracy_3=0.3))
    one["split"] = "3"
    assert row(markdown([one]), "LLaVA-AURORA (13B) (published)")[1] == "66.9"


def test_what_needs_no_model_stands_beside():
    text = markdown([points(accuracy=0.3, accuracy_3=0.4)])
    assert row(text, "chance")[1:] == ["29.0", "33.3"] and row(text, "majority")[1:] == ["35.0", ""]


def test_replaced_spans_have_a_table_with_the_published_ones():
    text = markdown([points(accuracy=0.3)])
    assert row(text, "mine, hardblink") == ["mine, hardblink", "50.0", "37.5", "+12.5"]
    spans = points(accuracy=0.3)["replacement"]["samples"]
    both = markdown([points(accuracy=0.3), points(accuracy=0.3) | {"split": "3"}])
    for split in ("all", "3"):
        assert row(both, f"mine, hardblink, split {split}, spatial seg, {spans} spans")[1:] == ["50.0", "37.5", "+12.5"]
    assert row(text, "Qwen2.5-VL-3B (published)")[1:] == ["71.2", "51.3", "+19.9"]
    assert "## Codes replaced" not in markdown([summary(ciou=0.5)])


def test_errors_are_no_percentages():
    depth = summary("world-depth", "depth", "all", absrel=0.0712, delta1=0.962, relative_mae=0.0514)
    assert row(markdown([depth]), "mine")[1:] == ["0.071", "96.2", "0.051"]


def test_one_run_for_the_terminal():
    run = points(accuracy=0.3, accuracy_3=0.4, unparsable=3)
    run["left_out"] = ["left out x: torn"]
    lines = run_text(run).splitlines()
    assert lines[0].startswith("hardblink (split all), 10 samples, model mine, spatial seg")
    assert lines[1] == "left out x: torn"
    assert ["accuracy", "0.300", "0.290", "0.350"] in [line.split() for line in lines]
    assert "3 answers could not be read and count as wrong." in lines
    assert any(line.split()[:3] == ["random", "37.5", "-12.5"] for line in lines)
    assert any("+12.5 points (identity - random), 60 % of what is above chance" in line for line in lines)
    assert any(line.startswith("Published (S)") for line in lines)


def test_table_and_plot_are_written(tmp_path):
    runs = [points(accuracy=0.3, accuracy_3=0.4), summary(ciou=0.5)]
    write_report(runs, tmp_path / "new")
    assert (tmp_path / "new" / "report.md").read_text() == markdown(runs)
    with Image.open(tmp_path / "new" / "report.png") as plot:
        assert plot.width > 800 and len(plot.convert("RGB").getcolors(1 << 24)) > 10
    write_report([summary("world-depth", "depth", "all", absrel=0.1)], tmp_path / "errors")  # nothing to plot
    assert sorted(path.name for path in (tmp_path / "errors").iterdir()) == ["report.md", "report.png"]


def test_summaries_are_found_in_folders_and_checked(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "summary.json").write_text(json.dumps(summary(name=name, ciou=0.5)))
    found = read_summaries([tmp_path / "runs", tmp_path / "runs" / "a", tmp_path / "runs" / "b" / "summary.json"])
    assert [item["model"]["name"] for item in found] == ["a", "b"], "each once"
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"holds no summary.json"):
            read_summaries([path])
    for text in ("torn {", "[]", '{"format": 99}', "{}"):
        (tmp_path / "empty" / "summary.json").write_text(text)
        with pytest.raises(ValueError, match="no summary of `perceptio eval`"):
            read_summaries([tmp_path / "empty"])


def test_published_figures_are_percentages_with_a_source():
    for model in PUBLISHED:
        assert "arXiv" in model.source and all(20 < value < 100 for value in model.figures.values())
