"""What the tiny model is taught to answer: masks, spans, steps in words and conclusions about one scene."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perceptio_hf.world import Question, Scene, refer_often
from perceptio_hf.world.cells import cell_at, cell_word, nearness_word

LETTERS = "ABCDE"
_LOOKED_UP = 8  # cells in one question about nearness
_CROWD = 14
# How often all marks of a picture lie at the same place of their cells, as those of fair sets do. Where none did, a ViT
# exchanged letters there, and nowhere else: it seems to have paired circles with letters by that place.
_ALIGNED = 0.5
_NOTHING = "none"  # in the place of cells, where nothing fits
_NEARNESS = ("How near are {cells}?", "Look up {cells}.", "Tell me how near {cells} are.")
_LOCATE = ("Where are the marked points?", "Which cells hold the circled points?", "Locate the labeled points.")


@dataclass(frozen=True)
class AnswerForm:
    """What answers are made of; the variants of an ablation differ here.

    Args:
        masks: [SEG] tokens for what is named, and referring questions.
        depth: depth spans where distance matters, questions about depth and nearness.
        steps: the cells a question is about, and their nearness if there is a span, in words before the conclusion.
        words: questions that are answered in words.
    """

    masks: bool = True
    depth: bool = True
    steps: bool = True
    words: bool = True


@dataclass(frozen=True)
class Response:
    """What the assistant is to write: a mask for each of `masks` (instance ids), a depth span if asked, words.

    `found` are the cells that the answer must find in the picture, in the order written (those that only repeat the
    question are not), `objects` the instance of each, where they are cells of objects.
    """

    question: str
    masks: tuple[int, ...]
    depth: bool
    words: str
    kind: str
    found: tuple[int, ...] = ()
    objects: tuple[int, ...] = ()


PHRASE = "phrase"  # the kind of a response that ends behind its [SEG]


@dataclass(frozen=True)
class Marks:
    """The points drawn into a picture, (x, y) each, and their letters."""

    points: tuple[tuple[int, int], ...]
    letters: tuple[str, ...]

    def cells(self, size: int, grid: int) -> tuple[int, ...]:
        """The cell of each."""
        return tuple(cell_at(point, (size, size), grid) for point in self.points)

    @classmethod
    def crowd(cls, size: int, grid: int, rng: np.random.Generator) -> "Marks":
        """A dozen points with letters that repeat, for learning to read them."""
        cells = rng.choice(grid**2, _CROWD, replace=False)
        letters = rng.choice(list(LETTERS), _CROWD).tolist()
        spots = (np.column_stack([cells % grid, cells // grid]) + _places(_CROWD, rng)) * size / grid
        return cls(tuple((int(x), int(y)) for x, y in spots), tuple(letters))

    @classmethod
    def anywhere(cls, size: int, grid: int, rng: np.random.Generator) -> "Marks":
        """Three to five points in cells of their own, off the border."""
        letters = LETTERS[: rng.integers(3, 6)]
        side, inner = size / grid, [cell for cell in range(grid**2) if 0 < cell % grid < grid - 1]
        cells = rng.choice([cell for cell in inner if grid <= cell < grid * (grid - 1)], len(letters), replace=False)
        spots = _places(len(letters), rng)
        points = tuple(
            (int((cell % grid + x) * side), int((cell // grid + y) * side))
            for cell, (x, y) in zip(cells, spots, strict=True)
        )
        return cls(points, tuple(letters))


def _places(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 2) places of marks in their cells, as shares of these."""
    own = rng.uniform(0.15, 0.85, (count, 2))
    return np.broadcast_to(own[:1], own.shape) if rng.random() < _ALIGNED else own


def steps_in_words(cells: Sequence[int], letters: Sequence[str] = (), *, nearness: bool) -> str:
    """`A p27 d00 B p03 d00`: cells, each behind its letter; the nearness is blank, the codec fills it in.

    Without letters the text begins with a space, since the words of cells hold the one before them.
    """
    near = f" {nearness_word(0)}" if nearness else ""
    heads = [f" {letter}" for letter in letters] or [""] * len(cells)
    text = "".join(f"{head} {cell_word(cell)}{near}" for head, cell in zip(heads, cells, strict=True))
    return text[1:] if letters else text


def compared_in_words(names: Sequence[str], cells: Sequence[int], *, nearness: bool) -> str:
    """`the ball p27 d00 the red box p03 d00`: each thing's cell behind its name."""
    steps = [steps_in_words([cell], nearness=nearness) for cell in cells]
    return " ".join(name + step for name, step in zip(names, steps, strict=True))


def cells_of_objects(scene: Scene, grid: int) -> np.ndarray:
    """(objects + 1, grid * grid) bool: the cells of every instance that hold at least half as much of it as the one
    that holds most; row 0, the background's, is empty. Every object has some, however small or hidden."""
    side = scene.size // grid
    blocks = scene.instances.reshape(grid, side, grid, side).swapaxes(1, 2).reshape(grid * grid, -1)
    held = np.stack([(blocks == k).sum(1) for k in range(len(scene.objects) + 1)])
    cells = (2 * held >= held.max(1, keepdims=True)) & (held > 0)
    cells[0] = False
    return cells


def cell_of_object(scene: Scene, instance: int, cells: np.ndarray) -> int:
    """The one of an object's `cells` (grid * grid,) bool that is nearest to its centre: the cell that is named."""
    grid = int(len(cells) ** 0.5)
    own = np.flatnonzero(cells)
    x, y = (value * grid / scene.size - 0.5 for value in scene.objects[instance - 1].center)
    return int(own[np.argmin((own % grid - x) ** 2 + (own // grid - y) ** 2)])


class Responder:
    """Makes responses to the questions about one scene."""

    def __init__(self, form: AnswerForm, grid: int):
        self.form, self.grid = form, grid

    def respond(self, scene: Scene, question: Question, *, masks: bool, depth: bool) -> Response:
        """The response with the spans asked for, as far as the form allows them."""
        masks, depth = masks and self.form.masks, depth and self.form.depth
        words, found, objects = question.answer, (), ()
        if self.form.steps and question.points:
            found = tuple(cell_at(point, scene.instances.shape, self.grid) for point in question.points)
            words = f"{steps_in_words(found, question.letters, nearness=depth)}: {words}"
        elif self.form.steps and question.kind == "closer_object":
            found, objects = self._cells(scene, question.targets)
            words = f"{compared_in_words(question.choices, found, nearness=depth)}: {words}"
        elif self.form.steps and question.kind in ("count", "attribute"):
            pairs = sorted(zip(*self._cells(scene, question.members), strict=True))
            found, objects = zip(*pairs, strict=True) if pairs else ((), ())
            words = f"{steps_in_words(found, nearness=False) or _NOTHING}: {words}"
        return Response(question.text, question.targets if masks else (), depth, words, question.kind, found, objects)

    def phrases(self, scene: Scene, rng: np.random.Generator, limit: int) -> list[Response]:
        """Up to `limit` referring questions whose answers end behind [SEG]."""
        questions = refer_often(scene, rng, limit)
        return [Response(question.text, question.targets, False, "", PHRASE) for question in questions]

    def _cells(self, scene: Scene, instances: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The cell of each object, and the objects."""
        cells = cells_of_objects(scene, self.grid)
        return tuple(cell_of_object(scene, k, cells[k]) for k in instances), tuple(instances)

    def choose(self, scene: Scene, questions: list[Question], marks: Marks, rng: np.random.Generator) -> list[Response]:
        """A response to every question, and those that only training asks: cells of marks, nearness of cells.

        A span costs as many tokens as four questions, so that only questions that rest on it get one: the closest
        mark, one about two objects, one about depth or nearness, now and then a referring one.
        """
        responses, compared = [], False
        for question in questions:
            if question.kind == "refer" and self.form.masks:
                responses.append(self.respond(scene, question, masks=True, depth=rng.random() < 0.06))
            elif question.kind == "depth" and self.form.depth:
                responses.append(self._depth(scene, question, marks, rng))
            elif question.kind == "closest_point" and self.form.words:
                responses.append(self.respond(scene, question, masks=False, depth=True))
            elif question.kind == "closer_object" and self.form.words and not compared:
                responses.append(self.respond(scene, question, masks=rng.random() < 0.5, depth=True))
                compared = True
            elif question.kind in ("count", "attribute") and self.form.words:
                responses.append(self.respond(scene, question, masks=False, depth=False))
        if marks.points and self.form.words and self.form.steps:
            cells = marks.cells(scene.size, self.grid)
            words = steps_in_words(cells, marks.letters, nearness=False)
            responses.append(Response(str(rng.choice(_LOCATE)), (), False, words, "locate", cells))
        return responses

    def _depth(self, scene: Scene, question: Question, marks: Marks, rng: np.random.Generator) -> Response:
        """The question about depth itself, or about the nearness of cells or marks."""
        draw = rng.random()
        if not (self.form.words and self.form.steps) or draw < 0.4:
            return self.respond(scene, question, masks=False, depth=True)
        if draw < 0.7 or not marks.points:
            cells = rng.choice(self.grid**2, _LOOKED_UP, replace=False).tolist()
            named = ", ".join(map(cell_word, cells[:-1])) + f" and {cell_word(cells[-1])}"
            found, letters = (), ()
        else:
            cells = found = marks.cells(scene.size, self.grid)
            named, letters = "the marked points", marks.letters
        text = str(rng.choice(_NEARNESS)).format(cells=named)
        return Response(text, (), True, steps_in_words(cells, letters, nearness=True), "nearness", found)
