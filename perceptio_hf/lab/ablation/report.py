"""The ablation as one table, one file of numbers and one picture."""

from pathlib import Path

from perceptio_hf.files import replacing, write_json, write_text

from .figures import METRICS

Table = dict[str, dict[str, dict[str, float]]]  # {variant: {metric: {mean, std, n}}}

_LABELS = {
    "answers_only": "answers only",
    "steps_only": "answers with steps in words, no spatial tokens",
    "spans_ce": "spans, plain cross-entropy",
    "composite": "+ marker, token and count losses",
    "full": "+ soft-merge reconstruction (full)",
    "full_vocabulary": "full, token loss over the whole vocabulary",
    "full_noise": "full, half of the codes that are read replaced",
    "full_no_seg": "full without segmentation",
    "seg_only": "segmentation alone",
}
# (what, better variant, baseline, metric, points asked for); figures of the paper at 8B, on its own benchmarks.
_CONTRASTS = (
    ("closest point", "full", "answers_only", "closest", 10.3),
    ("closest point, steps in words for both", "full", "steps_only", "closest", None),
    ("referring cIoU", "full", "seg_only", "ciou", 1.1),
    ("plain questions", "full", "answers_only", "plain_accuracy", 1.0),
    ("plain questions, steps in words for both", "full", "steps_only", "plain_accuracy", None),
)
_MALFORMED = ("spans_ce", "composite", "full")
_MALFORMED_AT_MOST = 0.5  # percent, of all but the first
_NOTES = """
- `closest_N`: of N marked points the nearest is named, on sets in which nothing but depth tells; the model writes its
  own span first. `closest` is their mean, `closest_lowest_rule` what always naming the lowest point scores.
- `object_closer`, `plain_accuracy`: which of two objects is closer; counts and attributes.
- `absrel`, `delta1`: of generated spans. `malformed_rate`, `count_mae`: with the grammar switched off and sampling at
  temperature 1, the share of responses without exactly one whole span, and how many codes too many or too few.
- `ciou`, `giou`: of referring expressions.
- `trt_...`: `closest` with the span's codes replaced: own, true ones, drawn from the data's distribution, another
  picture's, the first one repeated.
"""
_SHOWN = ("closest", "object_closer", "delta1", "ciou", "plain_accuracy")
_TRT = ("trt_own", "trt_oracle", "trt_random", "trt_other_image", "trt_first_repeat")


def write_report(table: Table, folder: str | Path, *, command: str) -> None:
    """Write `ablation.json`, `ablation.md` and `ablation.png` into `folder`; `command` is what made them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "ablation.json", table)
    write_text(folder / "ablation.md", markdown(table, command))
    _plot(table, folder / "ablation.png")


def markdown(table: Table, command: str) -> str:
    """The table, one row for each variant, and the contrasts that the paper reports."""
    lines = [
        "# Ablation on held-out rendered scenes",
        "",
        f"Made by `{command}`. Mean ± standard deviation over seeds; one seed has no ±.",
        "",
    ]
    for title, metrics in (("Answers", METRICS[:6]), ("Spans, masks, words", METRICS[6:13]), ("Replaced spans", _TRT)):
        lines += [f"## {title}", "", "| variant | " + " | ".join(metrics) + " |", "|---" * (1 + len(metrics)) + "|"]
        for variant, figures in table.items():
            cells = [_cell(figures.get(metric)) for metric in metrics]
            if any(cells):
                lines.append(f"| {variant}: {_LABELS.get(variant, '')} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([*lines, *_contrasts(table), _NOTES])


def _cell(figure: dict[str, float] | None) -> str:
    if figure is None:
        return ""
    return f"{figure['mean']:.3f} ± {figure['std']:.3f}" if figure["n"] > 1 else f"{figure['mean']:.3f}"


def _contrasts(table: Table) -> list[str]:
    lines = ["## Contrasts", "", "| what | difference | asked for |", "|---|---|---|"]
    for what, better, baseline, metric, asked in _CONTRASTS:
        one, other = (table.get(name, {}).get(metric) for name in (better, baseline))
        if one and other:
            points = 100 * (one["mean"] - other["mean"])
            goal = "" if asked is None else f"at least +{asked}"
            lines.append(f"| {what}: {better} - {baseline} | {points:+.1f} points | {goal} |")
    full, plain = table.get("full", {}), table.get("spans_ce", {})
    if "trt_oracle" in full:
        points = 100 * (full["trt_oracle"]["mean"] - full["trt_random"]["mean"])
        lines.append(f"| true codes - random codes (full) | {points:+.1f} points | at least +30 |")
    if "absrel" in full and "absrel" in plain:
        change = 100 * (full["absrel"]["mean"] / plain["absrel"]["mean"] - 1)
        lines.append(f"| AbsRel of full against spans_ce | {change:+.1f} % | at most -10 % |")
    rates = [
        100 * table[name]["malformed_rate"]["mean"] for name in _MALFORMED if "malformed_rate" in table.get(name, {})
    ]
    if len(rates) == len(_MALFORMED):
        shown = " / ".join(f"{rate:.1f} %" for rate in rates)
        what = f"malformed without the grammar: {' / '.join(_MALFORMED)}"
        lines.append(f"| {what} | {shown} | at most {_MALFORMED_AT_MOST} % but the first |")
    return lines


def _plot(table: Table, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 1)
    variants = [name for name in table if name != "seg_only"]
    _bars(axes[0], table, list(table), _SHOWN, "Held-out figures (higher is better)")
    _bars(axes[1], table, [name for name in variants if "trt_own" in table[name]], _TRT, "Closest point, span replaced")
    chance = (1 / 3 + 1 / 4 + 1 / 5) / 3
    axes[1].axhline(chance, color="0.4", linestyle="--", linewidth=1)
    axes[1].text(1.0, chance, " chance", transform=axes[1].get_yaxis_transform(), va="center", color="0.4", fontsize=8)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def _bars(axis, table: Table, variants: list[str], metrics: tuple[str, ...], title: str) -> None:
    width = 0.8 / max(1, len(variants))
    for index, variant in enumerate(variants):
        places = [k + (index - (len(variants) - 1) / 2) * width for k in range(len(metrics))]
        figures = [table[variant].get(metric) for metric in metrics]
        shown = [(place, value) for place, value in zip(places, figures, strict=True) if value]
        axis.bar(
            [place for place, _ in shown],
            [value["mean"] for _, value in shown],
            width * 0.92,
            yerr=[value["std"] for _, value in shown],
            error_kw={"linewidth": 0.8},
            color=f"C{list(_LABELS).index(variant) if variant in _LABELS else 9}",
            label=variant,
        )
    axis.set_xticks(range(len(metrics)), metrics)
    axis.set_ylim(0, 1)
    axis.set_title(title, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    if variants:
        axis.legend(fontsize=8, ncols=4, frameon=False, loc="upper right")
