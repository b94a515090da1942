"""Summaries of runs side by side: what each scored, what needs no model, and what others published."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perceptio_hf.evaluation.benchmarks import BENCHMARKS
from perceptio_hf.evaluation.run.runner import SUMMARY_FILE
from perceptio_hf.evaluation.run.scoring import SCORINGS
from perceptio_hf.evaluation.run.summary import FORMAT

from .published import PUBLISHED, PublishedModel

Summary = dict[str, Any]
Column = tuple[str, str, str]  # benchmark, split, metric

PUBLISHED_MARK = "(published)"
NOT_SHARES = ("absrel", "rmse", "relative_mae")  # errors: smaller is better


@dataclass(frozen=True)
class Comparison:
    """A table of figures: {row: {column: value}}; shares are 0 to 1. `published` are the rows that others measured."""

    columns: list[Column]
    rows: dict[str, dict[Column, float]]
    published: dict[str, str]  # row -> source


def read_summaries(paths: Sequence[Path]) -> list[Summary]:
    """Summaries from results folders, folders of such folders, or summary.json files.

    Raises:
        ValueError: where there is none, or one is damaged or of another format.
    """
    found = [file for path in paths for file in _summary_files(path)]
    return [_read_summary(file) for file in dict.fromkeys(found)]


def compare(summaries: Sequence[Summary]) -> Comparison:
    """All runs, what needs no model (chance, majority), and what is published for the same benchmarks."""
    columns: list[Column] = []
    rows: dict[str, dict[Column, float]] = {}
    free: dict[str, dict[Column, float]] = {"chance": {}, "majority": {}}
    most = Counter()  # samples of the run whose chance is shown
    for summary, label in zip(summaries, _labels(summaries), strict=True):
        for column in _columns(summary):
            columns += [column] * (column not in columns)
            rows.setdefault(label, {})[column] = summary["scores"][column[2]]
            if summary["samples"] > most[column]:
                most[column] = summary["samples"]
                for name, figures in summary["baselines"].items():
                    free[name] |= {column: figures[column[2]]} if column[2] in figures else {}
    published = _published_rows(columns)
    sources = {f"{model.name} {PUBLISHED_MARK}": model.source for model in PUBLISHED if model.name in published}
    rows |= {name: figures for name, figures in free.items() if figures}
    rows |= {f"{name} {PUBLISHED_MARK}": figures for name, figures in published.items()}
    return Comparison(columns, rows, sources)


def _summary_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / SUMMARY_FILE).is_file():
        return [path / SUMMARY_FILE]
    inside = sorted(path.glob(f"*/{SUMMARY_FILE}")) if path.is_dir() else []
    if not inside:
        raise ValueError(f"{path} holds no {SUMMARY_FILE}; name folders that `perceptio eval` wrote to the end.")
    return inside


def _read_summary(path: Path) -> Summary:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        wrong = summary["format"] != FORMAT or not {"benchmark", "scores", "model"} <= set(summary)
    except (ValueError, UnicodeDecodeError, KeyError, TypeError):
        wrong = True
    if wrong:
        raise ValueError(f"{path} is no summary of `perceptio eval` of this version; run it again.")
    return summary


def _columns(summary: Summary) -> list[Column]:
    names = [name for name in SCORINGS[summary["task"]].shown if summary["scores"].get(name) is not None]
    return [(summary["benchmark"], summary["split"], name) for name in names]


def _labels(summaries: Sequence[Summary]) -> list[str]:
    """A row for each run: the model's name, and what tells it from other runs where the name does not. Where a model
    was asked the same in several ways, all its rows say how; a run over a part of the data always says so."""
    digests: dict[str, set[str]] = {}
    for summary in summaries:
        digests.setdefault(summary["model"]["name"], set()).add(summary["model"]["weights_sha256"])
    labels = []
    for summary in summaries:
        name, digest = summary["model"]["name"], summary["model"]["weights_sha256"]
        part = "" if summary["data"].get("limit") is None else f", first {summary['data']['limit']} samples"
        labels.append((name if len(digests[name]) == 1 else f"{name} [{digest[:8]}]") + part)
    places = [(summary["benchmark"], summary["split"]) for summary in summaries]
    asked = Counter(zip(labels, places, strict=True))
    several = {label for (label, _), count in asked.items() if count > 1}
    ways = [f", spatial {summary['generation']['spatial']}" for summary in summaries]
    labels = [label + (way if label in several else "") for label, way in zip(labels, ways, strict=True)]
    asked, runs, found = Counter(zip(labels, places, strict=True)), Counter(), []
    for row in zip(labels, places, strict=True):
        runs[row] += 1
        found.append(row[0] if asked[row] == 1 else f"{row[0]}, run {runs[row]}")
    return found


def _published_rows(columns: Sequence[Column]) -> dict[str, dict[Column, float]]:
    rows = {}
    for model in PUBLISHED:
        found = {column: model.find(*column) for column in columns if not _lacks_sets(model, column, columns)}
        known = {column: value / 100 for column, value in found.items() if value is not None}
        if known:
            rows[model.name] = known
    return rows


def _lacks_sets(model: PublishedModel, column: Column, columns: Sequence[Column]) -> bool:
    """Whether a published mean is over sets of points of which the runs lack some."""
    benchmark, split, metric = column
    sets = {name for name in model.metrics(benchmark, split) if name.startswith("accuracy_")}
    return metric == "accuracy" and bool(sets - {name for *place, name in columns if place == [benchmark, split]})


def column_name(column: Column) -> str:
    """`refcoco val cIoU`."""
    benchmark, split, metric = column
    name = SCORINGS[BENCHMARKS[benchmark].task].metrics[metric]
    return f"{benchmark}{'' if split == 'all' else f' {split}'} {name}"
