"""From a checkpoint that has seen no photograph to depth of a room and masks of streets, before and after.

python benchmarks/photographs.py --rgbd FOLDER --camvid FOLDER --out benchmarks/results/photographs.json

The first folder holds frames NAME.color.jpg and NAME.depth.png of a depth sensor (millimetres, 0 = no reading), the
second one train/ and val/ with NAME.jpg and NAME.label.png, CamVid as prepared for SegNet. Three trainings by
`perceptio train`, each within 10 minutes of two cores:

    room      recipes/rgbd_lora.yaml     depth, measured on every fifth frame (`rgbd_lora.py`)
    streets   recipes/street_masks.yaml  masks of six classes, measured on the validation pictures (`streets.py`)
    both      recipes/photographs.yaml   one model for both, measured on both, and where an answer is to hold all

Every class that covers at least 1 % of a picture is asked for alone, [SEG] forced, greedy. IoU is averaged over the
pictures that show a class, then over classes. Beside it stands what can be drawn without looking: the same mask for all
pictures, where most training pictures have the class. `mask_depth_words` are the same questions, and those about depth
of the room, with [SEG] and a depth span forced: the share of answers whose words are right, and the mean IoU over
answers about streets. CamVid has no depth; what streets are taught is read off their labels (`streets.py`). Times are
of the training command: seconds, and seconds of processor time, which other work on the machine does not change.
Pictures beside the JSON file show what came out.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rgbd_lora as room
import streets
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

import perceptio_hf
from perceptio_hf.data.sources import DEPTH_ANSWER
from perceptio_hf.evaluation.run.answering import answer_questions
from perceptio_hf.files import out_file, write_json, write_picture
from perceptio_hf.processing.processing_perceptio import SpatialAnswer
from perceptio_hf.training.recipe import read_recipe
from perceptio_hf.visualization import colorize_depth, overlay

RECIPES = Path(__file__).parents[1] / "recipes"
PARTS = {"room": "rgbd_lora", "streets": "street_masks", "both": "photographs"}
SHOWN, PANEL = 6, (240, 180)
COLORS = np.array([(128, 64, 128), (70, 130, 220), (200, 90, 60), (232, 130, 220), (90, 150, 40), (20, 20, 150)])


def main() -> None:
    options, overrides = _options()
    torch.set_num_threads(1)
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    result |= {"about": "Photographs, before and after training on others by the named recipes.", "machine": _machine()}
    if overrides:
        result["options"] = overrides
    with tempfile.TemporaryDirectory() as scratch:
        runs = options.runs or Path(scratch)
        data = prepare(options, runs / "data")
        for part in options.parts:
            result[part] = MEASURES[part](options, data, runs / part, overrides)
            print(part, json.dumps(result[part]["figures"]), flush=True)
            write_json(options.out, result)


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rgbd", type=Path, required=True, help="folder with the frames of the room")
    parser.add_argument("--camvid", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--every", type=int, default=1, help="measure on every so many validation pictures")
    parser.add_argument("--runs", type=Path, help="folder that keeps the trainings; default: none is kept")
    parser.add_argument("--out", type=out_file, required=True, help="JSON file to write; pictures beside it")
    return parser.parse_known_args()


def _machine() -> str:
    return f"{torch.get_num_threads()} thread(s) while measuring; torch {torch.__version__.partition('+')[0]}"


def prepare(options: argparse.Namespace, data: Path) -> Path:
    """A folder as the recipes want it: `streets` and `streets_with_depth`, samples of CamVid's training pictures,
    and `room`, the frames."""
    data.mkdir(parents=True, exist_ok=True)
    streets.write_streets(options.camvid / "train", data / "streets")
    streets.write_streets(options.camvid / "train", data / "streets_with_depth", depth=True)
    if not (data / "room").exists():
        (data / "room").symlink_to(options.rgbd.resolve())
    return data


def train(part: str, data: Path, run: Path, overrides: Sequence[str]) -> dict[str, int]:
    """Run the part's recipe as a user would; returns the seconds it took, and those of processor time."""
    recipe = RECIPES / f"{PARTS[part]}.yaml"
    folder = data / "room" if part == "room" else data
    command = ["train", "--config", str(recipe), "--data_folder", str(folder), "--out", str(run), *overrides]
    code = "from perceptio_hf.commands.main import main; main()"
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code, *command], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"training_seconds": round(time.perf_counter() - start), "processor_seconds": round(used)}


def loaded(folder: str | Path) -> tuple[torch.nn.Module, object]:
    return AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def measure_room(options: argparse.Namespace, data: Path, run: Path, overrides: list[str]) -> dict:
    recipe = read_recipe(RECIPES / "rgbd_lora.yaml", ["--data_folder", str(data / "room"), "--output_dir", str(run)])
    trained_on, held_out = (room.frames_of(tasks, data / "room") for tasks in room._tasks(recipe.arguments))
    seconds = train("room", data, run, overrides)
    depths = room.predict_all(str(perceptio_hf.tiny_checkpoint()), run, held_out, trained_on)
    write_picture(options.out.with_name("photographs_room.png"), room.draw(held_out, depths))
    return seconds | {"figures": {name: room.means(maps, held_out) for name, maps in depths.items()}}


def measure_streets(options: argparse.Namespace, data: Path, run: Path, overrides: list[str]) -> dict:
    shown = streets.read_streets(options.camvid / "val")[:: options.every]
    seconds = train("streets", data, run, overrides)
    drawn = {
        "before": streets.predict_masks(*loaded(perceptio_hf.tiny_checkpoint()), shown),
        "after": streets.predict_masks(*loaded(run / "checkpoint"), shown),
    }
    usual = streets.usual_places(streets.read_streets(options.camvid / "train"), _size(shown[0]))
    drawn["usual_places"] = [{number: usual[number] for number in street.masks} for street in shown]
    figures = {name: streets.mask_figures(masks, shown) for name, masks in drawn.items()}
    sheet = draw_streets(shown, drawn["before"], drawn["after"], figures)
    write_picture(options.out.with_name("photographs_streets.png"), sheet)
    return seconds | {"pictures": len(shown), "figures": figures}


def _size(street: streets.Street) -> tuple[int, int]:
    return next(iter(street.masks.values())).shape


def measure_both(options: argparse.Namespace, data: Path, run: Path, overrides: list[str]) -> dict:
    tasks = [{"depth_folder": ".", "unit": "mm", "take_every": 5}]
    frames, shown = room.frames_of(tasks, data / "room"), streets.read_streets(options.camvid / "val")[:: options.every]
    seconds = train("both", data, run, overrides)
    model, processor = loaded(run / "checkpoint")
    masks, depths = streets.predict_masks(model, processor, shown), room.predict(model, processor, frames)
    figures = {"masks": streets.mask_figures(masks, shown), "depth": room.means(depths, frames)}
    asked = questions(shown, frames)
    answers = answer_all(model, processor, asked)
    figures["mask_depth_words"] = {
        place: answer_figures([pair for pair in zip(asked, answers, strict=True) if pair[0].place == place])
        for place in ("streets", "room")
    }
    write_picture(options.out.with_name("photographs_both.png"), draw_answers(asked, answers))
    return seconds | {"pictures": len(shown), "frames": len(frames), "figures": figures}


@dataclass(frozen=True, eq=False)
class Asked:
    """A question whose answer is to hold a mask, depth and words; with the true mask (height, width), if known."""

    place: str
    picture: Image.Image
    question: str
    words: str
    mask: np.ndarray | None


def questions(shown: list[streets.Street], frames: list[room.Frame]) -> list[Asked]:
    asked = []
    for street in shown:
        for number, mask in street.masks.items():
            question, answer = streets.question_and_answer(number)
            asked.append(Asked("streets", street.picture(), question, answer, mask))
    asked += [Asked("room", frame.picture, frame.question, DEPTH_ANSWER, None) for frame in frames]
    return asked


def answer_all(model: torch.nn.Module, processor, asked: list[Asked], *, batch: int = 16) -> list[SpatialAnswer]:
    """Mask and depth forced, greedy."""
    answers: list[SpatialAnswer] = []
    for start in tqdm(range(0, len(asked), batch), desc="answers with mask, depth and words"):
        part = asked[start : start + batch]
        pictures, questions = [one.picture for one in part], [one.question for one in part]
        options = {"spatial": "seg+depth", "max_new_tokens": 160}
        answers += [one.answer for one in answer_questions(model, processor, pictures, questions, **options)]
    return answers


def answer_figures(pairs: list[tuple[Asked, SpatialAnswer]]) -> dict[str, float]:
    figures = {"answers": len(pairs)}
    figures["words_right"] = round(float(np.mean([answer.text.strip() == one.words for one, answer in pairs])), 4)
    masked = [(answer.masks[0], one.mask) for one, answer in pairs if one.mask is not None]
    if masked:
        overlaps = [streets.intersection_over_union(drawn, true) for drawn, true in masked]
        figures["mean_iou"] = round(float(np.mean(overlaps)), 4)
    return figures


def draw_streets(
    shown: list[streets.Street],
    before: list[dict[int, np.ndarray]],
    after: list[dict[int, np.ndarray]],
    figures: dict[str, dict[str, float]],
) -> Image.Image:
    """Some pictures, evenly spaced: the photograph, the labels, and the masks before and after in the same colours."""
    rows = []
    for place in np.linspace(0, len(shown) - 1, SHOWN).round().astype(int):
        street = shown[place]
        picture = street.picture()
        row = [("", picture), ("labels", _painted(picture, street.masks))]
        for name, masks in (("before", before[place]), ("after", after[place])):
            row.append((f"{name}: mean IoU {_mean_iou(masks, street.masks):.2f}", _painted(picture, masks)))
        rows.append(row)
    names = ", ".join(name.removeprefix("the ") for name in streets.CLASSES.values())
    title = (
        f"{names}: mean IoU on {len(shown)} validation pictures {figures['before']['mean']:.2f} before, "
        f"{figures['after']['mean']:.2f} after;\nwithout looking, by the usual place of each class, "
        f"{figures['usual_places']['mean']:.2f}"
    )
    return _sheet(rows, title)


def _mean_iou(masks: dict[int, np.ndarray], true: dict[int, np.ndarray]) -> float:
    return float(np.mean([streets.intersection_over_union(masks[number], mask) for number, mask in true.items()]))


def _painted(picture: Image.Image, masks: dict[int, np.ndarray]) -> Image.Image:
    """The picture in grey with the masks over it, each class in its colour; of several the smallest shows."""
    canvas = np.asarray(picture.convert("L").convert("RGB")).astype(float) * 0.6 + 60
    grey, colors = canvas.copy(), dict(zip(streets.CLASSES, COLORS, strict=True))
    for number in sorted(masks, key=lambda number: -masks[number].sum()):
        canvas[masks[number]] = 0.45 * grey[masks[number]] + 0.55 * colors[number]
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def draw_answers(asked: list[Asked], answers: list[SpatialAnswer]) -> Image.Image:
    """Three streets and three frames, evenly spaced among the questions, one answer with mask, depth and words about
    each."""
    rows = []
    for place in ("streets", "room"):
        pairs = [pair for pair in zip(asked, answers, strict=True) if pair[0].place == place]
        for number in np.linspace(0, len(pairs) - 1, SHOWN // 2).round().astype(int):
            one, answer = pairs[number]
            marked = overlay(one.picture, answer.masks[:1])
            rows.append([(one.question, one.picture), (answer.text, marked), ("depth", colorize_depth(answer.depth))])
    return _sheet(rows, "One model, trained on masks of streets and depth of a room; mask and depth forced for all")


def _sheet(rows: list[list[tuple[str, Image.Image]]], title: str) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = len(rows[0])
    figure = Figure(figsize=(2.5 * columns, 2.05 * len(rows) + 0.6), dpi=90, facecolor="white")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots(len(rows), columns, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis, (words, picture) in zip(line, row, strict=True):
            axis.imshow(np.asarray(picture.resize(PANEL, Image.Resampling.BILINEAR)))
            axis.set_title(words, fontsize=8, pad=3)
            axis.set_axis_off()
    top = 1 - 0.75 / (2.05 * len(rows) + 0.6)
    figure.subplots_adjust(left=0.005, right=0.995, top=top, bottom=0.005, wspace=0.03, hspace=0.12)
    figure.suptitle(title, fontsize=9.5, y=0.99)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3].copy()).quantize(256)


MEASURES = {"room": measure_room, "streets": measure_streets, "both": measure_both}

if __name__ == "__main__":
    main()
