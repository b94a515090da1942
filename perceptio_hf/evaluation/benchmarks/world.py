"""Rendered scenes that no training saw, as benchmarks with exact masks, depth and answers.

Their questions depend on what is in a scene, so listing renders every scene once; a picture is rendered again when its
sample's turn comes.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import count, islice, zip_longest

import numpy as np

from perceptio_hf.data.depth_maps import DepthMap
from perceptio_hf.data.run_length import encode_mask
from perceptio_hf.evaluation.metrics.answer_statements import LETTERS
from perceptio_hf.world import HELD_OUT_SEED, Question, Scene, draw_points, render_scene
from perceptio_hf.world import ask as ask_about
from perceptio_hf.world.fair import FairSet, fair_sets
from perceptio_hf.world.questions import DEPTH_QUESTIONS

from .prompts import ask, named_letters
from .reading import Request
from .registration import Prompt, benchmark
from .sample import DepthSource, PictureSource, Sample

DEFAULT_SAMPLES = 200
_PER_SCENE = 2  # questions of one kind about one scene
_POINTS = (3, 4, 5)

_render = lru_cache(maxsize=4)(render_scene)  # a sample's picture and its depth are asked for one after the other


@benchmark(
    "world-refer",
    "Rendered scenes: segment what an expression refers to",
    files=None,
    prompt=Prompt("{question}", "the rendered world's own questions"),
    hub=("perceptio-world", "Rendered scenes, referring expressions"),
    task="referring_segmentation",
    spatial="seg",
)
def read_refer(request: Request) -> Iterator[Sample]:
    """Expressions that refer to one object each."""
    for scene, question in islice(_asked(("refer",)), _wanted(request)):
        masks = [encode_mask(scene.mask(target)) for target in question.targets]
        target = {"masks": masks, "no_target": False, "size": [scene.size, scene.size]}
        yield _sample(scene.seed, ask(request.name, question=question.text), target, question.text)


@benchmark(
    "world-closest",
    "Rendered scenes: which of 3 to 5 marked points is the closest; nothing but depth tells",
    files=None,
    prompt=Prompt("Which is closest to the camera: {options}?", "ours: names the letters that are drawn"),
    hub=("perceptio-world", "Rendered scenes, closest of marked points"),
    task="relative_depth",
    spatial="depth",
)
def read_closest(request: Request) -> Iterator[Sample]:
    """Marked points of which nothing but depth tells the nearest; sets of 3, 4 and 5 points in turn."""
    each = -(-_wanted(request) // len(_POINTS))
    rows = zip_longest(*(fair_sets(points, each) for points in _POINTS))
    items = (item for row in rows for item in row if item is not None)
    return (_closest_sample(request.name, item) for item in islice(items, _wanted(request)))


@benchmark(
    "world-plain",
    "Rendered scenes: counts and attributes",
    files=None,
    prompt=Prompt("{question}", "the rendered world's own questions"),
    hub=("perceptio-world", "Rendered scenes, counts and attributes"),
    task="multiple_choice",
    spatial="none",
)
def read_plain(request: Request) -> Iterator[Sample]:
    """Counts and attributes: questions without spatial answers."""
    for scene, question in islice(_asked(("count", "attribute")), _wanted(request)):
        letters = LETTERS[: len(question.choices)]
        target = {
            "answer": letters[question.choices.index(question.answer)],
            "choices": list(letters),
            "texts": list(question.choices),
            "category": question.kind,
            "l2_category": None,
            "index": None,
            "group": None,
        }
        yield _sample(scene.seed, ask(request.name, question=question.text), target, question.text)


@benchmark(
    "world-depth",
    "Rendered scenes: depth estimation",
    files=None,
    prompt=Prompt(DEPTH_QUESTIONS[0], "ours: the rendered world's first question of this kind"),
    hub=("perceptio-world", "Rendered scenes, depth"),
    task="depth",
    spatial="depth",
)
def read_depths(request: Request) -> Iterator[Sample]:
    """One depth question about each scene."""
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + _wanted(request)):
        yield _sample(seed, ask(request.name), {"depth": None}, "depth")


def _wanted(request: Request) -> int:
    return request.limit or DEFAULT_SAMPLES


def _asked(kinds: tuple[str, ...]) -> Iterator[tuple[Scene, Question]]:
    """Questions about held-out scenes, without end; at most two of a kind about each."""
    for seed in count(HELD_OUT_SEED):
        scene = render_scene(seed)
        questions = ask_about(scene, np.random.default_rng([seed, 1]), kinds)
        for kind in kinds:
            for question in islice((q for q in questions if q.kind == kind), _PER_SCENE):
                yield scene, question


def _sample(seed: int, question: str, target: dict, about: str) -> Sample:
    picture = PictureSource(f"scene {seed}", lambda: _render(seed).image)
    return Sample(f"scene {seed}: {about}", picture, question, target, _depth(seed))


def _depth(seed: int) -> DepthSource:
    return DepthSource(f"scene {seed}", lambda: DepthMap.from_metric(_render(seed).depth))


def _closest_sample(name: str, item: FairSet) -> Sample:
    def draw() -> np.ndarray:
        return draw_points(_render(item.seed).image, item.points, item.letters)

    marks = " ".join(f"{letter} {x},{y}" for letter, (x, y) in zip(item.letters, item.points, strict=True))
    target = {"answer": item.answer, "choices": list(item.letters), "points": len(item.points)}
    picture = PictureSource(f"scene {item.seed} with {marks}", draw)
    question = ask(name, options=named_letters(item.letters))
    return Sample(f"scene {item.seed}: {len(item.points)} points", picture, question, target, _depth(item.seed))
