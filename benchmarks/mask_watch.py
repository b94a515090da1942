"""Two trainings on the same photographs, one whose masks die and one whose masks live, as the trainer's log shows them.

python benchmarks/mask_watch.py --camvid FOLDER --out docs/images/mask_watch.png

Both learn "Please segment the road." from CamVid's training pictures by recipes/street_masks.yaml, for the same steps.
The first has one learning rate for all parts, the [SEG] projector as it is and the default weights of the loss.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import streets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from perceptio_hf.files import replacing
from perceptio_hf.training.masks.watch import WATCHED

RECIPE = Path(__file__).parents[1] / "recipes" / "street_masks.yaml"
ROAD = {3: streets.CLASSES[3]}
RUNS = {
    "one rate for all parts": [
        *("--mask_learning_rate", "1e-3", "--seg_projector_learning_rate", "1e-3", "--seg_projector_start", "0"),
        *("--mask_bce_weight", "2.0", "--mask_dice_weight", "0.5", "--mask_patience", "50"),
    ],
    "recipes/street_masks.yaml": ["--mask_patience", "50"],
}
PANELS = {"mask_dice": "Dice loss of the masks"} | WATCHED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", type=Path, required=True, help="folder with train/")
    parser.add_argument("--steps", default="200")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        streets.write_streets(options.camvid / "train", Path(scratch, "streets"), ROAD)
        logs = {name: _run(Path(scratch), f"run{place}", options.steps, RUNS[name]) for place, name in enumerate(RUNS)}
    for name, log in logs.items():
        print(name, {key: round(log[-1][key], 3) for key in PANELS})
    draw(logs, options.out)


def _run(data: Path, name: str, steps: str, options: Sequence[str]) -> list[dict[str, float]]:
    command = ["train", "--config", str(RECIPE), "--data_folder", str(data), "--out", str(data / name), "--max_steps"]
    code = "from perceptio_hf.commands.main import main; main()"
    saving = ["--save_strategy", "steps", "--save_steps", steps]
    subprocess.run([sys.executable, "-c", code, *command, steps, *saving, *options], check=True)
    state = json.loads((data / name / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "mask_dice" in entry]


def draw(logs: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    figure = Figure(figsize=(11, 2.9), dpi=100, layout="constrained", facecolor="white")
    for axes, (key, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for color, (name, log) in zip(("#d1495b", "#1f6fb4"), logs.items(), strict=True):
            steps, values = np.array([(entry["step"], entry[key]) for entry in log]).T
            axes.plot(steps, values, color=color, linewidth=1.6, label=name)
        axes.set_title(title if len(title) < 30 else f"{key}:\n{title}", fontsize=8, loc="left")
        axes.set_ylim(0, 1.03)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


if __name__ == "__main__":
    main()
