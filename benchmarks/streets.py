"""CamVid as samples of referring segmentation, and masks measured on it; used by photographs.py.

python benchmarks/streets.py FOLDER/train OUT [--with-depth]

FOLDER/train and FOLDER/val hold NAME.jpg and NAME.label.png (8 bits, the class of each pixel), as prepared for SegNet.
OUT becomes a folder of samples, which recipes read: all classes of a picture in one conversation, or with depth, one
question about each picture, answered by a mask, a depth span and words. CamVid has no depth; it is read off the labels:
ground recedes evenly to the horizon in inverse depth, what stands on it is as far as its foot, the sky is farthest.
"""

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from perceptio_hf.data.run_length import encode_mask
from perceptio_hf.data.sources import paired_files, write_samples
from perceptio_hf.evaluation.run.answering import answer_questions
from perceptio_hf.tokens import DEPTH_END_TOKEN, DEPTH_START_TOKEN, SEG_TOKEN

CLASSES = {3: "the road", 0: "the sky", 1: "the buildings", 4: "the pavement", 5: "the trees", 8: "the cars"}
LEAST_SHARE = 0.01  # of the picture: what covers less is neither taught nor asked about
QUESTION, ANSWER = "Please segment {}.", "Here {} {}."
SKY, GROUND = 0, (3, 4)


@dataclass(frozen=True, eq=False)
class Street:
    """A photograph, and the mask (height, width) of each class that covers enough of it, by its number."""

    name: str
    file: Path
    masks: dict[int, np.ndarray]
    labels: Path

    def picture(self) -> Image.Image:
        return Image.open(self.file).convert("RGB")


def read_streets(folder: Path, classes: dict[int, str] = CLASSES) -> list[Street]:
    streets = []
    for name, (picture, labels) in paired_files(folder, "*.jpg", "*.label.png").items():
        classes_of = np.asarray(Image.open(labels))
        masks = {number: classes_of == number for number in classes}
        kept = {number: mask for number, mask in masks.items() if mask.mean() >= LEAST_SHARE}
        streets.append(Street(name, picture, kept, labels))
    return streets


def question_and_answer(number: int) -> tuple[str, str]:
    thing = CLASSES[number]
    return QUESTION.format(thing), ANSWER.format("are" if thing.endswith("s") else "is", thing)


def conversations(streets: list[Street], seed: int = 0) -> Iterator[dict[str, Any]]:
    """One sample for each picture, which asks for all of its classes in turn, in random order: the picture is read once
    for six masks."""
    rng = random.Random(seed)
    for street in streets:
        numbers = rng.sample(sorted(street.masks), len(street.masks))
        messages = []
        for number in numbers:
            question, answer = question_and_answer(number)
            said = f"{SEG_TOKEN} {answer}"
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
        masks = [encode_mask(street.masks[number]) for number in numbers]
        yield {"id": street.name, "images": [street.file], "messages": messages, "masks": masks}


def answers_with_depth(streets: list[Street], seed: int = 0) -> Iterator[dict[str, Any]]:
    """One sample for each picture, about one of its classes."""
    rng = random.Random(seed)
    for street in streets:
        number = rng.choice(sorted(street.masks))
        question, answer = question_and_answer(number)
        said = SEG_TOKEN + DEPTH_START_TOKEN + DEPTH_END_TOKEN + answer
        yield {
            "id": street.name,
            "images": [street.file],
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": said}],
            "masks": [encode_mask(street.masks[number])],
            "depth": depth_of_labels(np.asarray(Image.open(street.labels))),
            "depth_unit": "disparity",
        }


def depth_of_labels(classes: np.ndarray) -> np.ndarray:
    """(height, width) classes -> (height, width) float32 inverse depth in [0, 1], see above."""
    rows = np.broadcast_to(np.arange(len(classes))[:, None], classes.shape)
    ground = np.isin(classes, GROUND)
    horizon = np.quantile(rows[ground], 0.01) if ground.any() else len(classes) / 2
    foot = np.where(ground, rows, len(classes) - 1)  # the ground that is next below; at the edge the picture's end
    for row in range(len(classes) - 2, -1, -1):
        foot[row] = np.where(ground[row], row, foot[row + 1])
    nearness = (foot - horizon).clip(0) / (len(classes) - 1 - horizon)
    return np.where(classes == SKY, 0, nearness).astype(np.float32)


def write_streets(folder: Path, out: Path, classes: dict[int, str] = CLASSES, *, depth: bool = False) -> Path:
    """The photographs of `folder` as a folder of samples; one that is there already stays."""
    if out.exists():
        return out
    streets = [street for street in read_streets(folder, classes) if street.masks]
    return write_samples(out, answers_with_depth(streets) if depth else conversations(streets))


def predict_masks(
    model: torch.nn.Module, processor: Callable, streets: list[Street], *, batch: int = 16
) -> list[dict[int, np.ndarray]]:
    """For each street and each of its classes the mask (height, width) that the model draws, each asked for alone, with
    a [SEG] forced and greedy decoding."""
    asked = [(place, number) for place, street in enumerate(streets) for number in street.masks]
    drawn: list[dict[int, np.ndarray]] = [{} for _ in streets]
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        pictures = [streets[place].picture() for place, _ in part]
        questions = [question_and_answer(number)[0] for _, number in part]
        found = answer_questions(model, processor, pictures, questions, spatial="seg", max_new_tokens=24)
        for (place, number), response in zip(part, found, strict=True):
            drawn[place][number] = response.answer.masks[0]
    return drawn


def intersection_over_union(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / max((one | other).sum(), 1))


def mask_figures(drawn: list[dict[int, np.ndarray]], streets: list[Street]) -> dict[str, float]:
    """Mean IoU over the pictures that show a class, for each class, and the mean of these."""
    figures = {}
    for number, name in CLASSES.items():
        values = [
            intersection_over_union(masks[number], street.masks[number])
            for masks, street in zip(drawn, streets, strict=True)
            if number in street.masks
        ]
        if values:
            figures[name.removeprefix("the ")] = round(float(np.mean(values)), 4)
    return {"mean": round(float(np.mean(list(figures.values()))), 4)} | figures


def usual_places(streets: list[Street], size: tuple[int, int]) -> dict[int, np.ndarray]:
    """The mask of each class that can be drawn without looking: where at least half of the training pictures that show
    it have it, or, where that is so nowhere, half as many as anywhere."""
    masks = {}
    for number in CLASSES:
        seen = [street.masks[number] for street in streets if number in street.masks]
        if seen:
            share = np.mean([np.asarray(Image.fromarray(mask).resize(size[::-1])) for mask in seen], axis=0)
            masks[number] = share >= min(0.5, 0.5 * float(share.max()))
    return masks


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--with-depth", action="store_true")
    options = parser.parse_args()
    write_streets(options.folder, options.out, depth=options.with_depth)
