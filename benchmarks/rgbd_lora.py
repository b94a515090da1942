"""A checkpoint adapted to real pictures by LoRA, measured on pictures it was not trained on, before and after.

python benchmarks/rgbd_lora.py --data FOLDER --out benchmarks/results/rgbd_lora.json

FOLDER holds frames NAME.color.jpg and NAME.depth.png of a depth sensor (millimetres, 0 = no reading). Training is
`perceptio train --config recipes/rgbd_lora.yaml`; the recipe also says which frames are held out: every fifth, in the
order of their names. Options that are not listed here go to it, e.g. --max_steps 50.

Depth is asked for with a depth span forced and greedy decoding, aligned to the sensor's readings by scale and shift in
inverse depth (`perceptio_hf.evaluation.metrics.depth`), and compared where the sensor has one. Beside it stand

    constant        the same distance everywhere: what alignment alone gives
    mean_of_room    the mean depth of the training frames, for every picture alike: what can be said without looking
    codec           the sensor's own depth, written as codes and decoded: the best that codes can say

The picture beside the JSON file shows four of the held-out frames, small.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModel, AutoProcessor

import perceptio_hf
from perceptio_hf.data.depth_maps import DepthMap, read_depth
from perceptio_hf.data.tasks import load_tasks
from perceptio_hf.evaluation.metrics.depth import align_scale_shift, depth_metrics
from perceptio_hf.files import out_file, write_json, write_picture
from perceptio_hf.modeling.modeling_depth_vqvae import prepare_depth
from perceptio_hf.processing.pictures import load_picture
from perceptio_hf.training.recipe import RecipeArguments, read_recipe
from perceptio_hf.visualization import colorize_depth

RECIPE = Path(__file__).parents[1] / "recipes" / "rgbd_lora.yaml"
SHOWN, PANEL = 4, (200, 150)  # frames in the picture, and their (width, height) there
FIGURES = ("absrel", "delta1", "rmse")


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture with what the sensor measured, and the question of its sample."""

    name: str
    picture: Image.Image
    depth: DepthMap
    question: str


def main() -> None:
    options, overrides = _options()
    torch.set_num_threads(1)
    base = options.model or perceptio_hf.tiny_checkpoint()
    with tempfile.TemporaryDirectory() as scratch:
        run = options.run or Path(scratch) / "run"
        overrides += ["--model_name_or_path", base, "--data_folder", str(options.data), "--output_dir", str(run)]
        recipe = read_recipe(options.recipe, overrides)
        trained_on, held_out = (frames_of(tasks, options.data) for tasks in _tasks(recipe.arguments))
        seconds = train(options.recipe, overrides)
        depths = predict_all(base, run, held_out, trained_on)
    result = {
        "about": "Depth of held-out frames of a room, before and after LoRA on other frames of it; means over frames.",
        "model": "the embedded tiny checkpoint" if options.model is None else Path(base).name,
        "frames": {"trained_on": len(trained_on), "held_out": len(held_out), "rule": _rule(recipe.arguments)},
        "training_seconds": seconds,
        "figures": {name: means(maps, held_out) for name, maps in depths.items()},
        "absrel_of_frames": per_frame(depths, held_out),
        "recipe": {key: value for key, value in recipe.values.items() if key not in _PLACES},
    }
    for name, figure in result["figures"].items():
        print(f"{name:>14}: " + ", ".join(f"{key} {value:.3f}" for key, value in figure.items()))
    write_json(options.out, result)
    write_picture(options.out.with_suffix(".png"), draw(held_out, depths))


_PLACES = ("model_name_or_path", "data_folder", "output_dir")


def _tasks(arguments: RecipeArguments) -> tuple[list[dict], list[dict]]:
    """The recipe's tasks for training, without the variants they are shown in, and those for measuring."""
    plain = [{key: value for key, value in task.items() if key != "variants"} for task in arguments.tasks]
    return plain, arguments.eval_tasks


def _rule(arguments: RecipeArguments) -> str:
    step = arguments.eval_tasks[0]["take_every"]
    return f"in the order of their names, frames {step}, {2 * step}, {3 * step}, ... are held out"


def frames_of(tasks: list[dict], folder: Path) -> list[Frame]:
    datasets, _ = load_tasks(tasks, str(folder))
    return [_frame(row) for dataset in datasets.values() for row in dataset]


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the frames")
    parser.add_argument("--model", help="folder of a checkpoint; default: the embedded one")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--run", type=Path, help="folder that keeps the training; default: none is kept")
    parser.add_argument("--out", type=out_file, required=True, help="JSON file to write; a .png beside it")
    return parser.parse_known_args()


def _frame(row: dict) -> Frame:
    """The frame of a sample made by `depth_folder`."""
    question = next(part["text"] for part in row["messages"][0]["content"] if part["type"] == "text")
    depth = read_depth(row["depth"][0]["path"], row["depth_unit"])
    return Frame(row["id"], load_picture(row["images"][0]["path"]), depth, question)


def train(recipe: Path, options: Sequence[str]) -> int:
    """Run `perceptio train` in a process of its own, as a user would; returns the seconds it took."""
    start = time.perf_counter()
    code = "from perceptio_hf.commands.main import main; main()"
    subprocess.run([sys.executable, "-c", code, "train", "--config", str(recipe), *options], check=True)
    return round(time.perf_counter() - start)


def predict_all(base: str, run: Path, frames: list[Frame], trained: list[Frame]) -> dict[str, list[np.ndarray]]:
    """Relative inverse depth of every frame by everything that is compared; the adapter is loaded by PEFT's own call,
    and must say the same as the merged checkpoint."""
    processor, model = AutoProcessor.from_pretrained(base), AutoModel.from_pretrained(base).eval()
    codec, mean = model.depth_model, mean_of([frame.depth for frame in trained], model.config.depth_config.image_size)
    depths = {"before": predict(model, processor, frames)}
    depths["after"] = predict(PeftModel.from_pretrained(model, run / "checkpoint").eval(), processor, frames)
    merged = predict(AutoModel.from_pretrained(run / "merged").eval(), processor, frames)
    for one, other in zip(depths["after"], merged, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    depths["constant"] = [np.zeros_like(frame.depth.relative) for frame in frames]
    depths["mean_of_room"] = [_resized(mean, frame.depth.relative.shape) for frame in frames]
    depths["codec"] = [_by_codec(codec, frame.depth) for frame in frames]
    return depths


@torch.no_grad()
def predict(model: torch.nn.Module, processor: Callable, frames: list[Frame]) -> list[np.ndarray]:
    """The depth that the model says, at the size of the pictures; one frame at a time."""
    depths = []
    for frame in frames:
        content = [{"type": "image", "image": frame.picture}, {"type": "text", "text": frame.question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        out = model.generate(
            **inputs, do_sample=False, spatial="depth", max_new_tokens=160, return_dict_in_generate=True
        )
        depths.append(processor.post_process_spatial(out)[0].depth)
    return depths


def _by_codec(codec: torch.nn.Module, depth: DepthMap) -> np.ndarray:
    codes = codec.encode(torch.from_numpy(depth.relative), torch.from_numpy(depth.valid))
    return codec.decode(codes, size=depth.relative.shape).cpu().numpy()


def mean_of(maps: list[DepthMap], side: int) -> np.ndarray:
    """(side, side): the mean of relative inverse depth over the maps that have a reading at a pixel."""
    total = torch.zeros(2, side, side)
    for depth in maps:
        filled, weight = prepare_depth(torch.from_numpy(depth.relative), torch.from_numpy(depth.valid), side)
        total += torch.stack([filled[0, 0] * weight[0, 0], weight[0, 0]])
    return (total[0] / total[1].clamp(min=1e-6)).numpy()


def _resized(depth: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    values = torch.from_numpy(depth)[None, None]
    return torch.nn.functional.interpolate(values, size, mode="bilinear", align_corners=False)[0, 0].numpy()


def figures(depth: np.ndarray, frame: Frame) -> dict[str, float]:
    return depth_metrics(depth, frame.depth.metric, frame.depth.valid)


def means(depths: list[np.ndarray], frames: list[Frame]) -> dict[str, float]:
    rows = [figures(depth, frame) for depth, frame in zip(depths, frames, strict=True)]
    return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in FIGURES}


def per_frame(depths: dict[str, list[np.ndarray]], frames: list[Frame]) -> dict[str, dict[str, float]]:
    """AbsRel of each held-out frame."""
    return {
        frame.name: {name: round(figures(maps[place], frame)["absrel"], 4) for name, maps in depths.items()}
        for place, frame in enumerate(frames)
    }


def draw(frames: list[Frame], depths: dict[str, list[np.ndarray]]) -> Image.Image:
    """Some frames, evenly spaced: the picture, the sensor's depth, and depth before and after in the sensor's scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = np.linspace(0, len(frames) - 1, SHOWN).round().astype(int)
    figure = Figure(figsize=(9.2, 1.9 * SHOWN + 0.4), dpi=90, facecolor="white")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots(SHOWN, 4, squeeze=False)
    for row, place in zip(axes, places, strict=True):
        panels = _panels(frames[place], depths["before"][place], depths["after"][place])
        for axis, (title, picture) in zip(row, panels, strict=True):
            axis.imshow(np.asarray(picture.resize(PANEL, Image.Resampling.BILINEAR)))
            axis.set_title(title, fontsize=8.5, pad=3)
            axis.set_axis_off()
    figure.subplots_adjust(left=0.005, right=0.995, top=0.93, bottom=0.005, wspace=0.03, hspace=0.11)
    before, after = (means(depths[name], frames) for name in ("before", "after"))
    figure.suptitle(
        f"Depth of {len(frames)} held-out frames, before and after LoRA: AbsRel {before['absrel']:.3f} to "
        f"{after['absrel']:.3f}, $\\delta$<1.25 {before['delta1']:.2f} to {after['delta1']:.2f}. Near is bright.",
        fontsize=10,
        y=0.988,
    )
    canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3].copy())
    return drawn.quantize(256)  # a third of the bytes


def _panels(frame: Frame, before: np.ndarray, after: np.ndarray) -> list[tuple[str, Image.Image]]:
    panels = [(f"frame {frame.name.removeprefix('frame-')}", frame.picture)]
    panels += [("depth sensor (grey: no reading)", colorize_depth(frame.depth.relative, frame.depth.valid))]
    for name, depth in (("before", before), ("after", after)):
        error = figures(depth, frame)
        title = f"{name}: AbsRel {error['absrel']:.3f}, $\\delta$<1.25 {error['delta1']:.2f}"
        panels.append((title, colorize_depth(_aligned(depth, frame.depth))))
    return panels


def _aligned(depth: np.ndarray, sensor: DepthMap) -> np.ndarray:
    """Fitted to the sensor's relative depth, so that equal colours are equal distances."""
    scale, shift = align_scale_shift(depth, sensor.relative, sensor.valid)
    return np.clip(scale * depth + shift, 0, 1)


if __name__ == "__main__":
    main()
