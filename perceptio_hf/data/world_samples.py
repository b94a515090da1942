"""The rendered world as training samples, one question each: for tests, for recipes, and to see what a sample is."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from perceptio_hf.tokens import DEPTH_END_TOKEN, DEPTH_START_TOKEN, SEG_TOKEN
from perceptio_hf.world import Question, Scene, ask, draw_points, render_scene
from perceptio_hf.world.cells import cell_at, cell_word
from perceptio_hf.world.fair import fair_sets

from .rows import import_datasets, sample_features, to_row
from .run_length import encode_mask

if TYPE_CHECKING:
    from datasets import IterableDataset

# Task -> kinds of questions of the world.
WORLD_TASKS = {
    "refer": ("refer",),  # referring segmentation: [SEG], words
    "depth": ("depth",),  # depth span, words
    "spatial": ("closer_object", "closest_point"),  # spans first, then the answer that can be read off them
    "plain": ("count", "attribute"),  # no spans
}
FAIR = "closest"  # the same question of marked points alone, fair: nothing but depth tells (`perceptio_hf.world.fair`)
_FAIR_POINTS, _SCENES_PER_SET = (3, 4, 5), 6
_FAIR_BLOCK = 150  # scenes that fair questions are drawn from together
_SHARDS = 1024  # at most; a stream is split between processes, and skipped through, by shards


def world_sample(
    scene: Scene,
    question: Question,
    *,
    task: str | None = None,
    masks: bool = True,
    depth: bool = True,
    cells: int | None = None,
) -> dict[str, Any]:
    """A question about a scene as a sample (see `perceptio_hf.data.samples.Sample`).

    Args:
        task: its name; default: the question's kind.
        masks: write a [SEG] for each object that the answer rests on.
        depth: write a depth span where the answer rests on depth.
        cells: side of a grid; the answer about marked points then names the cell of each before it concludes, as in
            `A p27 B p03: A` (see `perceptio_hf.world.cells`).
    """
    targets = question.targets if masks else ()
    spatial = depth and question.kind in ("depth", *WORLD_TASKS["spatial"])
    words = question.answer
    if cells and question.points:
        places = (cell_word(cell_at(point, scene.instances.shape, cells)) for point in question.points)
        steps = " ".join(f"{letter} {place}" for letter, place in zip(question.letters, places, strict=True))
        words = f"{steps}: {words}"
    said = SEG_TOKEN * len(targets) + (DEPTH_START_TOKEN + DEPTH_END_TOKEN) * spatial + words
    drawn = question.points
    sample = {
        "id": f"scene {scene.seed}: {question.text}",
        "images": [draw_points(scene.image, drawn, question.letters) if drawn else scene.image],
        "messages": [{"role": "user", "content": question.text}, {"role": "assistant", "content": said}],
        "masks": [encode_mask(scene.mask(target)) for target in targets],
        "task": task or question.kind,
    }
    return sample | ({"depth": scene.depth, "depth_unit": "m"} if spatial else {})


def iter_world_samples(task: str, seeds: Sequence[int], *, size: int = 128, **options: Any) -> Iterator[dict[str, Any]]:
    """All samples of a task about the scenes with these numbers, in a row for fair questions; `options` go to
    `world_sample`.

    Raises:
        ValueError: for an unknown task, or too few scenes for fair questions.
    """
    _check_task(task)
    if task == FAIR:
        yield from _fair_samples(seeds, size, options)
        return
    for seed in seeds:
        scene = render_scene(seed, size=size)
        for question in ask(scene, np.random.default_rng([seed, 1]), WORLD_TASKS[task]):
            yield world_sample(scene, question, task=task, **options)


def world_dataset(
    task: str,
    *,
    scenes: int,
    first_seed: int = 0,
    size: int = 128,
    masks: bool = True,
    depth: bool = True,
    cells: int | None = None,
) -> "IterableDataset":
    """A stream of samples that are rendered as they are needed.

    Args:
        task: one of `WORLD_TASKS`, or "closest": fair questions of 3 to 5 marked points, one or more for two scenes.
        scenes: how many.
        first_seed: number of the first; see `perceptio_hf.world` for the numbers that are held out.
        size: width and height of the pictures in pixels.
        masks, depth, cells: as in `world_sample`.

    Raises:
        ValueError: for an unknown task or no scene.
    """
    _check_task(task)
    if scenes < 1:
        raise ValueError(f"scenes is {scenes}; it must be 1 or more.")
    last = first_seed + scenes
    per_shard = _FAIR_BLOCK if task == FAIR else -(-scenes // _SHARDS)
    shards = [(start, min(start + per_shard, last)) for start in range(first_seed, last, per_shard)]
    options = {"task": task, "size": size, "masks": masks, "depth": depth, "cells": cells}
    return import_datasets().IterableDataset.from_generator(
        _rows, features=sample_features(), gen_kwargs={"shards": shards, "options": options}
    )


def _rows(shards: list[tuple[int, int]], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for first, last in shards:
        for sample in iter_world_samples(seeds=range(first, last), **options):
            yield to_row(sample)


def _check_task(task: str) -> None:
    if task not in WORLD_TASKS and task != FAIR:
        raise ValueError(f"Unknown task {task!r}; the world has {', '.join((*WORLD_TASKS, FAIR))}.")


def _fair_samples(seeds: Sequence[int], size: int, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Questions with 3, 4 and 5 points in turn."""
    each = max(1, len(seeds) // _SCENES_PER_SET)
    found = [fair_sets(n, each, scenes=len(seeds), first_seed=seeds[0], size=size) for n in _FAIR_POINTS]
    for item in (item for row in zip_longest(*found) for item in row if item is not None):
        listed = f"{', '.join(item.letters[:-1])} or {item.letters[-1]}"
        question = Question(
            "closest_point",
            f"Which is closest to the camera: {listed}?",
            item.answer,
            points=item.points,
            letters=item.letters,
            choices=item.letters,
        )
        yield world_sample(render_scene(item.seed, size=size), question, task=FAIR, **options)
