"""Runs as text: one for the terminal, several as a table for people to compare, published figures beside them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perceptio_hf.evaluation.replacement.token_replacement import REPLACEMENTS
from perceptio_hf.files import write_text

from .comparison import NOT_SHARES, PUBLISHED_MARK, Comparison, Summary, column_name, compare
from .plot import plot_report
from .published import PUBLISHED_REPLACEMENTS, REPLACEMENT_SOURCE


def markdown(summaries: Sequence[Summary]) -> str:
    """The whole report: comparison, replaced spans, runs, sources."""
    table = compare(summaries)
    lines = [
        "# Comparison",
        "",
        f"Percent, except errors. Rows marked {PUBLISHED_MARK} were measured by others, with their own models, prompts "
        "and data preparation; see the sources below.",
        "",
        *_markdown_table(["model", *map(column_name, table.columns)], _cells(table)),
        "",
        *_replacement_section(summaries),
        "## Runs",
        "",
        *_markdown_table(_RUN_COLUMNS, map(_run_row, summaries)),
    ]
    if table.published:
        lines += ["", "## Sources", "", *(f"- {row}: {source}" for row, source in table.published.items())]
    return "\n".join(lines) + "\n"


def write_report(summaries: Sequence[Summary], folder: Path) -> None:
    """Write report.md and report.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.md", markdown(summaries))
    plot_report(compare(summaries), summaries, folder / "report.png")


def run_text(summary: Summary) -> str:
    """One run for the terminal."""
    generation, model = summary["generation"], summary["model"]
    lines = [
        f"{summary['benchmark']} (split {summary['split']}), {summary['samples']} samples, model {model['name']}, "
        f"spatial {generation['spatial']}",
        *summary["left_out"][:5],
        "",
    ]
    names = [name for name in summary["scores"] if isinstance(summary["scores"][name], float)]
    baselines = summary["baselines"]
    rows = [
        [name, f"{summary['scores'][name]:.3f}"]
        + [f"{figures[name]:.3f}" if name in figures else "" for figures in baselines.values()]
        for name in names
    ]
    lines += _aligned([["", "model", *baselines], *rows])
    unparsable = summary["scores"].get("unparsable")
    if unparsable:
        lines.append(f"{unparsable} answers could not be read and count as wrong.")
    if summary["replacement"]:
        lines += ["", *_replacement_text(summary["replacement"])]
    return "\n".join(lines)


def _figure(metric: str, value: float) -> str:
    return f"{value:.3f}" if metric in NOT_SHARES else f"{100 * value:.1f}"


def _cells(table: Comparison) -> list[list[str]]:
    return [
        [label, *(_figure(column[2], row[column]) if column in row else "" for column in table.columns)]
        for label, row in table.rows.items()
    ]


_RUN_COLUMNS = ("model", "benchmark", "split", "samples", "spatial", "decoding", "weights", "data", "samples/s")


def _run_row(summary: Summary) -> list[str]:
    generation = summary["generation"]
    speed = summary["time"]["samples_per_second"]
    return [
        summary["model"]["name"],
        summary["benchmark"],
        summary["split"],
        str(summary["samples"]),
        generation["spatial"],
        generation["decoding"],
        summary["model"]["weights_sha256"][:8],
        summary["data"]["sha256"][:8],
        "" if speed is None else f"{speed:.2f}",
    ]


def _replacement_section(summaries: Sequence[Summary]) -> list[str]:
    runs = [summary for summary in summaries if summary["replacement"]]
    if not runs:
        return []
    names = [name for name in REPLACEMENTS if any(name in run["replacement"]["replacements"] for run in runs)]
    rows = []
    for run in runs:
        found = run["replacement"]["replacements"]
        accuracies = [f"{100 * found[name]['accuracy']:.1f}" if name in found else "" for name in names]
        points = run["replacement"]["content_points"]
        content = "" if points is None else f"{points:+.1f}"
        which = (run["model"]["name"], run["benchmark"])
        if sum((other["model"]["name"], other["benchmark"]) == which for other in runs) > 1:
            spans = f"{run['replacement']['samples']} spans"
            which += (f"split {run['split']}", f"spatial {run['generation']['spatial']}", spans)
        rows.append([", ".join(which), *accuracies, content])
    for model, figures in PUBLISHED_REPLACEMENTS.items():
        content = f"{figures['identity'] - figures['random']:+.1f}"
        rows.append([f"{model} {PUBLISHED_MARK}", *(str(figures.get(name, "")) for name in names), content])
    return [
        "## Codes replaced in the depth span",
        "",
        "Accuracy in percent; prompt, picture, number of tokens and decoding stay. The last column is identity minus "
        "random: points that rest on what the span says.",
        "",
        *_markdown_table(["model", *names, "content"], rows),
        "",
        *(f"- {name}: {REPLACEMENTS[name]}" for name in names),
        f"- {PUBLISHED_MARK[1:-1]}: {REPLACEMENT_SOURCE}; `constant` is its constant / zero",
        "",
    ]


def _replacement_text(found: dict[str, Any]) -> list[str]:
    rows = [["codes in the span", "accuracy", "points", "95 % interval", "changed"]]
    for name, figures in found["replacements"].items():
        low, high = figures["points_interval"]
        interval = "" if name == "identity" else f"{low:+.1f} to {high:+.1f}"
        points = "" if name == "identity" else f"{figures['points']:+.1f}"
        rows.append([name, f"{100 * figures['accuracy']:.1f}", points, interval, f"{100 * figures['changed']:.0f} %"])
    lines = _aligned(rows)
    if found["content_points"] is not None:
        share = (
            "" if found["content_share"] is None else f", {100 * found['content_share']:.0f} % of what is above chance"
        )
        lines.append(f"On the codes rest {found['content_points']:+.1f} points (identity - random){share}.")
    lines.append(
        f"Chance {100 * found['chance']:.1f}; {found['samples']} spans, {found['without_span']} answers without."
    )
    if "published" in found:
        lines += ["", f"Published ({found['published']['source']}):"]
        for model, figures in found["published"]["accuracy_percent"].items():
            lines.append(f"  {model}: " + ", ".join(f"{name} {value}" for name, value in figures.items()))
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]


def _markdown_table(header: Sequence[str], rows) -> list[str]:
    lines = [[*header], ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
