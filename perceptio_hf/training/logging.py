"""How the loss and its parts go: the progress bar, and the picture `losses.png`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import ProgressCallback, Trainer

from perceptio_hf.files import replacing
from perceptio_hf.training.attention.targets import LOOKS

from .losses import PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TITLES = {"loss": "loss: weighted sum of the parts"} | {
    part.name: part.title for part in (*PARTS.values(), *LOOKS.values())
}
_COLUMNS = 3
_TRAIN, _EVALS = "#1f6fb4", ("#d1495b", "#2e8b57", "#8e5ea2", "#c17c00")
_MANY = 60  # points of a curve above which a moving median is drawn over it

Curve = list[tuple[int, float]]  # (step, value)


def draw_losses(
    history: Sequence[Mapping[str, float]], path: str | Path, *, names: Sequence[str] | None = None
) -> Path | None:
    """Draw the loss and its parts over the steps, in training and evaluation.

    Args:
        history: `trainer.state.log_history`: dicts with `step` and, in training, `loss` and the parts, or in evaluation
            the same names behind `eval_` (`eval_<set>_` where there are several sets).
        path: of the PNG; it appears when it is complete.
        names: what to draw; None: the loss and the parts of the composite objective.

    Returns:
        The path, or None where there is nothing to draw.
    """
    panels = {name: curves for name in names or _TITLES if (curves := loss_curves(history, name))}
    if not panels:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot, which would choose a display

    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.3 * columns, 2.6 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    labels = sorted({label for curves in panels.values() for label in curves} - {"training"})
    colors = dict(zip(labels, _EVALS * len(labels), strict=False))  # the same in all panels
    for axes, (name, curves) in zip(grid.flat, panels.items(), strict=False):
        _draw_panel(axes, _TITLES.get(name, name), curves, colors)
    if any(len(curves) > 1 for curves in panels.values()):
        widest = max(grid.flat, key=lambda axes: len(axes.get_legend_handles_labels()[1]))
        figure.legend(*widest.get_legend_handles_labels(), loc="outside upper right", ncols=6, frameon=False)
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)
    return Path(path)


def loss_curves(history: Sequence[Mapping[str, float]], name: str) -> dict[str, Curve]:
    """The curves of one part, "training" first, then one for each evaluation set; only those with values."""
    pattern = re.compile(rf"(?:eval_(?:(.+)_)?)?{name}")
    curves: dict[str, Curve] = {}
    for entry in history:
        for key, value in entry.items():
            match = pattern.fullmatch(key)
            if match is None or not np.isfinite(value):
                continue
            label = "training" if key == name else "evaluation" + (f" ({match[1]})" if match[1] else "")
            curves.setdefault(label, []).append((entry["step"], value))
    return {label: curves[label] for label in sorted(curves, key=lambda label: (label != "training", label))}


def _draw_panel(axes: "Axes", title: str, curves: Mapping[str, Curve], colors: Mapping[str, str]) -> None:
    for label, curve in curves.items():
        steps, values = np.array(curve, dtype=float).T
        if label == "training":
            _draw_training(axes, steps, values, label)
        else:
            axes.plot(steps, values, "o-", color=colors[label], markersize=3.5, linewidth=1.4, label=label)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _fit(axes, curves)


def _draw_training(axes: "Axes", steps: np.ndarray, values: np.ndarray, label: str) -> None:
    many = len(values) > _MANY
    marker = "o-" if len(values) == 1 else "-"
    axes.plot(
        steps,
        values,
        marker,
        color=_TRAIN,
        markersize=3.5,
        linewidth=0.7 if many else 1.4,
        alpha=0.3 if many else 1,
        label=None if many else label,
    )
    if many:
        axes.plot(steps, moving_median(values, len(values) // 30), color=_TRAIN, linewidth=1.6, label=label)


def moving_median(values: np.ndarray, reach: int) -> np.ndarray:
    """The median of each value and up to `reach` neighbours on either side; (n,) -> (n,)."""
    return np.array([np.median(values[max(place - reach, 0) : place + reach + 1]) for place in range(len(values))])


def _fit(axes: "Axes", curves: Mapping[str, Curve]) -> None:
    """From zero, which is what all parts go towards, to a height that a few spikes do not set."""
    values = np.concatenate([[value for _, value in curve] for curve in curves.values()])
    top = min(values.max(), 1.5 * np.quantile(values, 0.98))
    axes.set_ylim(min(0.0, values.min() * 1.1), 1.08 * top if top > 0 else 1.0)


class LossBar(ProgressCallback):
    """transformers' bar with the parts of the loss behind it, instead of a line for each log. Evaluations are lines."""

    def on_log(self, args, state, control, logs: dict[str, float] | None = None, **kwargs) -> None:
        if self.training_bar is None or not state.is_world_process_zero or not logs:
            return
        shown = {name: value for name, value in logs.items() if name not in _HIDDEN and "runtime" not in name}
        numbers = {
            name: f"{value:.3g}" for name, value in shown.items() if isinstance(value, float) and "_per_" not in name
        }
        if "loss" in logs:
            self.training_bar.set_postfix(numbers)
        elif any(name.startswith("eval_") for name in logs):
            words = ", ".join(f"{name} {value}" for name, value in numbers.items())
            self.training_bar.write(f"step {state.global_step}: {words}")


_HIDDEN = ("learning_rate", "epoch", "grad_norm", "total_flos")


def show_losses(trainer: Trainer) -> None:
    """Put the bar in the place of transformers' own, unless progress bars are switched off."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(LossBar())
