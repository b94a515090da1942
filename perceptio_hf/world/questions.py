"""Questions about a scene whose answers are known, drawn so that neither wording nor a simple rule gives them away.

In every kind the wording is drawn from a pool that does not depend on the answer, and the answer (or whether a
shortcut rule is right) is drawn before the objects that the question is about.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .balance import draw_fair, surprise
from .descriptions import (
    DEPTH_RATIO,
    Description,
    Speaker,
    capitalized,
    noun_phrase,
    plain_name,
    with_article,
)
from .parts import pick, weighted
from .points import choose_points
from .render import render_scene
from .scene import ATTRIBUTES, Scene, SceneObject

QUESTION_KINDS = ("refer", "count", "attribute", "closer_object", "closest_point", "depth")
COUNTS = ("0", "1", "2", "3", "4", "5", "6")
YES_NO = ("yes", "no")

MIN_TARGET_PIXELS = 40  # of a picture of 128 x 128; smaller targets are not referred to


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    `targets` are the instances to be segmented, in the order named; `members` those that were counted or asked about
    (none where nothing fits); `points` are (x, y) pixels marked with `letters` (both empty unless the question speaks
    of marked points); `choices` are all possible answers of a closed question.
    """

    kind: str
    text: str
    answer: str
    targets: tuple[int, ...] = ()
    points: tuple[tuple[int, int], ...] = ()
    letters: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    members: tuple[int, ...] = ()


def ask(scene: Scene, rng: np.random.Generator, kinds: Sequence[str] | None = None) -> list[Question]:
    """Questions of all `kinds` (default: all of QUESTION_KINDS) that this scene supports, about a dozen.

    A kind yields fewer questions, or none, where the scene has no good ones: nothing borderline is asked.
    """
    wanted = QUESTION_KINDS if kinds is None else tuple(kinds)
    unknown = [kind for kind in wanted if kind not in QUESTION_KINDS]
    if unknown:
        raise ValueError(f"unknown question kinds {unknown}: choose from {', '.join(QUESTION_KINDS)}")
    r = random.Random(int(rng.integers(2**62)))
    speaker = Speaker(scene.objects, scene.size, r)
    questions: dict[str, Question] = {}  # by text: no question twice
    for kind in wanted:
        tries = _TRIES[kind]
        for _ in range(tries[int(r.random() * len(tries))]):
            question = _ASKERS[kind](scene, speaker, r)
            if question is not None:
                questions.setdefault(question.text, question)
    return list(questions.values())


_REFER = (
    "Segment {x}.",
    "Please segment {x}.",
    "Find {x}.",
    "Can you find {x}?",
    "Where is {x}?",
    "Show me {x}.",
    "Point out {x}.",
    "Mark {x} in the picture.",
    "Highlight {x}.",
    "Give me the mask of {x}.",
    "Which pixels belong to {x}?",
    "Cut out {x}, please.",
)
_REFER_ANSWERS = ("Here is {x}.", "This is {x}.", "Here it is.")


def _visible(scene: Scene, speaker: Speaker) -> list[int]:
    """The objects that are large enough to be referred to."""
    least = MIN_TARGET_PIXELS * (scene.size / 128) ** 2
    return [n for n in speaker.numbers if scene.objects[n - 1].pixels >= least]


def refer_often(scene: Scene, rng: np.random.Generator, limit: int) -> list[Question]:
    """Up to `limit` referring questions without answers, as many as possible about every object: by its looks twice, by
    its place twice."""
    r = random.Random(int(rng.integers(2**62)))
    speaker = Speaker(scene.objects, scene.size, r)
    found: dict[str, int] = {}
    for target in _visible(scene, speaker):
        for express in (speaker.by_looks, speaker.by_looks, speaker.by_place, speaker.by_place):
            expression = express(target)
            if expression is not None:
                found.setdefault(expression, target)
    chosen = r.sample(sorted(found.items()), min(limit, len(found)))
    return [Question("refer", pick(r, _REFER).format(x=x), "", (target,)) for x, target in chosen]


def _ask_refer(scene: Scene, speaker: Speaker, r: random.Random) -> Question | None:
    visible = _visible(scene, speaker)
    if not visible:
        return None
    target = pick(r, visible)
    expression = speaker.by_looks(target) if r.random() < 0.5 else speaker.by_place(target)
    if expression is None:
        return None
    answer = pick(r, _REFER_ANSWERS).format(x=plain_name(scene.objects[target - 1]))
    return Question("refer", pick(r, _REFER).format(x=expression), answer, (target,))


_COUNT = (
    "How many {x} are there?",
    "How many {x} do you see?",
    "How many {x} are in the picture?",
    "Count the {x}.",
    "What is the number of {x}?",
    "Tell me how many {x} there are.",
)
# How often an answer is tried for: the inverse of how often scenes allow it, so that answers come out even.
_COUNT_WEIGHTS = (0.5, 0.55, 0.55, 0.8, 1.1, 1.9, 3.0)
_COUNT_FORMS = (
    (),
    ("color",),
    ("shape",),
    ("size",),
    ("material",),
    ("color", "shape"),
    ("size", "shape"),
    ("size", "color"),
    ("material", "shape"),
)


def _ask_count(scene: Scene, speaker: Speaker, r: random.Random) -> Question | None:
    count = weighted(r, _COUNT_WEIGHTS)
    options = {form: _descriptions_of(speaker, form, count) for form in _COUNT_FORMS}
    forms = [form for form in _COUNT_FORMS if options[form]]
    if not forms:
        return None
    forms = [form for form in forms if form or r.random() < 0.4] or forms  # "things" alone would mostly mean many
    description = pick(r, options[pick(r, forms)])
    phrase = noun_phrase(r, description, plural=True)
    members = speaker.fitting(description)
    return Question("count", pick(r, _COUNT).format(x=phrase), str(count), choices=COUNTS, members=members)


def _descriptions_of(speaker: Speaker, names: Sequence[str], count: int) -> list[Description]:
    """All descriptions by the attributes `names` that fit exactly `count` objects."""
    every: list[Description] = [()]
    for name in names:
        every = [(*d, (name, value)) for d in every for value in ATTRIBUTES[name]]
    return [d for d in every if len(speaker.fitting(d)) == count]


_ATTRIBUTE = {
    "color": (
        "What color is {x}?",
        "What is the color of {x}?",
        "Which color does {x} have?",
        "Tell me the color of {x}.",
    ),
    "shape": (
        "What shape is {x}?",
        "What is the shape of {x}?",
        "Which shape does {x} have?",
        "Tell me the shape of {x}.",
    ),
    "size": ("What size is {x}?", "Is {x} {a} or {b}?", "How big is {x}?", "Tell me the size of {x}."),
    "material": (
        "What finish does {x} have?",
        "Is {x} {a} or {b}?",
        "What is the surface of {x} like?",
        "Tell me the finish of {x}.",
    ),
}
_EXISTS = (
    "Is there {x}?",
    "Do you see {x}?",
    "Can you see {x}?",
    "Does the picture show {x}?",
    "Is {x} in the picture?",
)
_VERIFY = ("Is {x} {v}?", "Would you say that {x} is {v}?", "Is it true that {x} is {v}?")


def _ask_attribute(scene: Scene, speaker: Speaker, r: random.Random) -> Question | None:
    topic = pick(r, ("color", "color", "shape", "shape", "size", "material", "exists", "exists", "exists", "verify"))
    if topic == "exists":
        return _ask_existence(speaker, r)
    if topic == "verify":
        return _ask_verification(scene, speaker, r)
    values = ATTRIBUTES[topic]
    value = _draw_value(scene, r, topic)
    target = _any_with(scene, r, topic, value)
    expression = speaker.by_any(target, without=topic) if target else None
    if expression is None:
        return None
    a, b = values[:2] if r.random() < 0.5 else values[1::-1]
    text = capitalized(pick(r, _ATTRIBUTE[topic]).format(x=expression, a=a, b=b))
    return Question("attribute", text, value, choices=values, members=(target,))


def _draw_value(scene: Scene, r: random.Random, name: str) -> str:
    """An answer first: any of two values, or any of the many that the scene shows."""
    values = ATTRIBUTES[name]
    return pick(r, values if len(values) == 2 else sorted({getattr(thing, name) for thing in scene.objects}))


def _any_with(scene: Scene, r: random.Random, name: str, value: str) -> int | None:
    numbers = [n for n, thing in enumerate(scene.objects, 1) if getattr(thing, name) == value]
    return pick(r, numbers) if numbers else None


def _ask_existence(speaker: Speaker, r: random.Random) -> Question | None:
    forms = (("color",), ("shape",), ("color", "shape"), ("size", "color"), ("size", "shape"), ("material", "shape"))
    names = pick(r, forms)
    present = [d for d in speaker.index if tuple(name for name, _ in d) == names]
    absent = _descriptions_of(speaker, names, 0)
    if len(names) > 1:  # one value first, for both answers: no word may go with "yes"
        part = (names[0], pick(r, ATTRIBUTES[names[0]]))
        present, absent = [d for d in present if part in d], [d for d in absent if part in d]
    if not present or not absent:  # asked only where both answers are possible, so that the form says nothing
        return None
    # Half of the absent ones are made of parts that are all there, just not together.
    tempting = [d for d in absent if all(speaker.fitting((part,)) for part in d)]
    absent = tempting if tempting and r.random() < 0.5 else absent
    answer = pick(r, YES_NO)
    description = pick(r, present if answer == "yes" else absent)
    text = pick(r, _EXISTS).format(x=with_article(noun_phrase(r, description)))
    members = speaker.fitting(description)
    return Question("attribute", capitalized(text), answer, choices=YES_NO, members=members)


def _ask_verification(scene: Scene, speaker: Speaker, r: random.Random) -> Question | None:
    name = pick(r, ("color", "size", "material"))
    true = _draw_value(scene, r, name)
    target = _any_with(scene, r, name, true)
    expression = speaker.by_any(target, without=name) if target else None
    if expression is None:
        return None
    answer = pick(r, YES_NO)
    value = true if answer == "yes" else pick(r, [v for v in ATTRIBUTES[name] if v != true])
    text = pick(r, _VERIFY).format(x=expression, v=value)
    return Question("attribute", capitalized(text), answer, choices=YES_NO, members=(target,))


CLOSER_QUESTIONS = (
    "Which is closer to the camera, {x} or {y}?",
    "Which is nearer, {x} or {y}?",
    "What is closer to you, {x} or {y}?",
    "Of {x} and {y}, which is nearer to the camera?",
    "Compare {x} and {y}: which is closer?",
    "Is {x} or {y} closer to the camera?",
)
# Weights of the choice model (see `balance`) for `_object_features`: fitted to random pairs, then moved until
# "the lower" and "the bigger one" were right in half of what is asked.
CLOSER_SHORTCUTS = (24.0, -15.5, 3.3)


def _ask_closer(scene: Scene, speaker: Speaker, r: random.Random) -> Question | None:
    things = scene.objects
    named = [n for n in speaker.numbers if speaker.unique(n)]
    pairs = [(a, b) for a in named for b in named if things[b - 1].depth >= things[a - 1].depth * DEPTH_RATIO]
    features = [_object_features(thing, scene.size) for thing in things]
    surprises = [surprise((features[a - 1], features[b - 1]), CLOSER_SHORTCUTS, 0) for a, b in pairs]
    index = draw_fair(r, surprises, limit=16.0, enough=3.3)
    if index is None:
        return None
    near, far = pairs[index]
    words = {n: speaker.by_looks(n) for n in (near, far)}
    first, second = (near, far) if r.random() < 0.5 else (far, near)
    text = capitalized(pick(r, CLOSER_QUESTIONS).format(x=words[first], y=words[second]))
    return Question("closer_object", text, words[near], (first, second), choices=(words[first], words[second]))


def _object_features(thing: SceneObject, size: int) -> tuple[float, ...]:
    """What can be seen of an object without depth."""
    return thing.center[1] / size, thing.box[3] / size, math.log(thing.pixels / size**2)


POINT_QUESTIONS = (
    "Multiple points are circled on the image, labeled by letters beside each circle. "
    "Which point is the closest to the camera?",
    "Several points are circled and labeled by letters. Which point is closest to the camera?",
    "Which of the circled points is the closest to the camera?",
    "Look at the points labeled {list}. Which one is nearest to the camera?",
    "Which labeled point is closest to you?",
    "Which is closest to the camera: {list}?",
)


def _ask_points(scene: Scene, speaker: Speaker, r: random.Random) -> Question | None:
    points = choose_points(scene, r)
    if points is None:
        return None
    letters = list("ABCDE"[: len(points)])
    choices = tuple(letters)
    r.shuffle(letters)
    answer = letters[0]  # the nearest comes first
    marked = sorted(zip(letters, points, strict=True))
    listed = ", ".join(choices[:-1]) + " or " + choices[-1]
    return Question(
        "closest_point",
        pick(r, POINT_QUESTIONS).format(list=listed),
        answer,
        points=tuple(point for _, point in marked),
        letters=choices,
        choices=choices,
    )


DEPTH_QUESTIONS = (
    "Describe the depth of the scene.",
    "How far is everything?",
    "Show the depth of this picture.",
    "Give me a depth map.",
    "Estimate the depth of the picture.",
    "How far away are the things in the picture?",
)


def _ask_depth(scene: Scene, speaker: Speaker, r: random.Random) -> Question | None:
    order = sorted(speaker.numbers, key=lambda n: scene.objects[n - 1].depth)
    depths = [scene.objects[n - 1].depth for n in order]
    names = [plain_name(scene.objects[n - 1]) for n in order]
    answer = "Here is the depth map."
    if depths[1] >= depths[0] * DEPTH_RATIO:
        answer = f"{capitalized(names[0])} is nearest."
        if depths[-1] >= depths[-2] * DEPTH_RATIO and r.random() < 0.5:
            answer = f"{capitalized(names[0])} is nearest and {names[-1]} is farthest."
    return Question("depth", pick(r, DEPTH_QUESTIONS), answer)


_ASKERS: dict[str, Callable[[Scene, Speaker, random.Random], Question | None]] = {
    "refer": _ask_refer,
    "count": _ask_count,
    "attribute": _ask_attribute,
    "closer_object": _ask_closer,
    "closest_point": _ask_points,
    "depth": _ask_depth,
}
_TRIES = {
    "refer": (4, 5),
    "count": (3, 4),
    "attribute": (3, 4),
    "closer_object": (4,),
    "closest_point": (1,),
    "depth": (1,),
}


def text_corpus(scenes: int, seed: int = 0) -> list[str]:
    """All questions and answers about `scenes` scenes from number `seed` on, for training a tokenizer."""
    rng = np.random.default_rng(seed)
    found = (q for number in range(scenes) for q in ask(render_scene(seed + number, 64), rng))
    return [text for question in found for text in (question.text, question.answer)]
