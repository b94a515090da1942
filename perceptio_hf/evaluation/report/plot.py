"""A comparison of runs as bars."""

from collections.abc import Sequence
from pathlib import Path

from perceptio_hf.evaluation.replacement.token_replacement import REPLACEMENTS
from perceptio_hf.files import replacing

from .comparison import NOT_SHARES, PUBLISHED_MARK, Column, Comparison, Summary, column_name
from .published import PUBLISHED_REPLACEMENTS

_GREYS = {"chance": "0.55", "majority": "0.75"}  # what needs no model


def plot_report(table: Comparison, summaries: Sequence[Summary], path: Path) -> None:
    """Bars of all shares, and of accuracies with replaced spans where there are any, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = [column for column in table.columns if column[2] not in NOT_SHARES]
    runs = [summary for summary in summaries if summary["replacement"]]
    panels = [_scores_panel] * bool(shares) + [_replacement_panel] * bool(runs)
    width = max(8.0, 1.5 * max(len(shares), len(REPLACEMENTS)))
    figure = Figure(figsize=(width, 0.6 + 4.2 * max(1, len(panels))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(1, len(panels)), 1, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=False):
        panel(axis, table, shares, runs)
        axis.set_ylim(0, 100)
        axis.set_ylabel("percent")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    if not panels:
        axes[0].set_axis_off()
        axes[0].text(0.5, 0.5, "These runs have errors only, no shares to plot; see report.md.", ha="center")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def _scores_panel(axis, table: Comparison, columns: Sequence[Column], _runs) -> None:
    rows = {label: row for label, row in table.rows.items() if any(column in row for column in columns)}
    bars = {label: [100 * row[column] if column in row else None for column in columns] for label, row in rows.items()}
    _bars(axis, [column_name(column).replace(" ", "\n", 1) for column in columns], bars)
    axis.set_title("Scores; hatched bars are published by others", loc="left", fontsize=10)


def _replacement_panel(axis, _table, _columns, runs: Sequence[Summary]) -> None:
    names = [name for name in REPLACEMENTS if any(name in run["replacement"]["replacements"] for run in runs)]
    bars: dict[str, list[float | None]] = {}
    for run in runs:
        found = run["replacement"]["replacements"]
        label = f"{run['model']['name']}, {run['benchmark']}"
        bars[label] = [100 * found[name]["accuracy"] if name in found else None for name in names]
    for model, figures in PUBLISHED_REPLACEMENTS.items():
        bars[f"{model} {PUBLISHED_MARK}"] = [figures.get(name) for name in names]
    _bars(axis, names, bars)
    axis.set_title("Accuracy with the span's codes replaced", loc="left", fontsize=10)


def _bars(axis, places: Sequence[str], bars: dict[str, list[float | None]]) -> None:
    width = 0.84 / max(1, len(bars))
    for index, (label, values) in enumerate(bars.items()):
        known = [
            (place + (index - (len(bars) - 1) / 2) * width, value)
            for place, value in enumerate(values)
            if value is not None
        ]
        style = {"hatch": "///", "alpha": 0.55} if label.endswith(PUBLISHED_MARK) else {}
        color = _GREYS.get(label, f"C{index % 10}")
        axis.bar([x for x, _ in known], [y for _, y in known], width * 0.92, color=color, label=label, **style)
    axis.set_xticks(range(len(places)), places, fontsize=8)
    axis.set_xlim(-0.5, len(places) - 0.5)
