"""Draws how masks went in two or more trainings, from their logs.

python benchmarks/mask_watch.py --out PICTURE "NAME=runs/one" "OTHER NAME=runs/two"

Each run is the output folder of `perceptio train` with at least one checkpoint. docs/training.md says how its two were
made.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from perceptio_hf.files import out_file, replacing
from perceptio_hf.training.checkpoints import last_checkpoint
from perceptio_hf.training.masks.watch import WATCHED

PANELS = {"mask_dice": "Dice loss of the masks"} | WATCHED
COLORS = ("#d1495b", "#1f6fb4", "#2e8b57", "#8e5ea2")

Log = Sequence[Mapping[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="NAME=FOLDER of each training")
    parser.add_argument("--out", type=out_file, required=True, help="picture to write")
    options = parser.parse_args()
    logs = {name: log_of(Path(folder)) for name, folder in (run.split("=", 1) for run in options.runs)}
    for name, log in logs.items():
        print(name, "step", log[-1]["step"], {key: round(log[-1][key], 3) for key in PANELS})
    draw(logs, options.out)


def log_of(run: Path) -> Log:
    state = json.loads((last_checkpoint(run) / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if PANELS.keys() <= entry.keys()]


def draw(logs: Mapping[str, Log], path: Path) -> None:
    figure = Figure(figsize=(11, 3.1), dpi=100, layout="constrained", facecolor="white")
    for axes, (key, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for color, (name, log) in zip(COLORS, logs.items(), strict=False):
            steps, values = np.array([(entry["step"], entry[key]) for entry in log]).T
            axes.plot(steps, values, color=color, linewidth=1.6, label=name)
        axes.set_title(f"{key}:\n{title}", fontsize=8, loc="left")
        axes.set_ylim(0, 1.03)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(logs), frameon=False, fontsize=9)
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


if __name__ == "__main__":
    main()
