"""Marked points in photographs, without shortcuts: as `perceptio_hf.world.fair` does it in rendered scenes.

For a set of places, one picture is taken for every possible answer: with the places alone, each answer is then right
equally often, however near things usually stand low in pictures. Letters are given out so that each is right equally
often as well.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from math import perm

import numpy as np

from perceptio_hf.world.fair import GRID, cell_center, draw_cells

CELLS = GRID * GRID
MARGIN = 0.08  # of relative inverse depth, between points that are told apart
_SMOOTH = 0.05  # largest spread of it around a point
_REACH = 64  # a point's depth must hold for a 64th of the shorter side around it
_MOST, _FRUITLESS = 4, 1000  # sets with the same places; draws of places without a set after which it is enough
_COUNTS = {"closest": (3, 4, 5), "order": (3,)}


@dataclass(frozen=True)
class PointQuestion:
    """Points in a picture.

    Args:
        kind: "closest" or "order".
        picture: its number among the readings.
        cells: of the points, by letter.
        letters: of the points: "A", "B", ...
        answer: letters, the nearest first: one for "closest", all for "order".
    """

    kind: str
    picture: int
    cells: tuple[int, ...]
    letters: tuple[str, ...]
    answer: tuple[str, ...]

    def points(self, width: int, height: int) -> list[tuple[int, int]]:
        """(x, y) of each, in a picture of this size."""
        return [cell_center(cell, width, height) for cell in self.cells]


def read_cells(relative: np.ndarray) -> np.ndarray:
    """Relative inverse depth (height, width) at the middle of every cell, (CELLS,) float32; NaN where it is not smooth
    around it."""
    height, width = relative.shape
    reach = max(1, min(height, width) // _REACH)
    values = np.full(CELLS, np.nan, dtype=np.float32)
    if min(height, width) < 4 * GRID:
        return values
    for cell in range(CELLS):
        x, y = cell_center(cell, width, height)
        around = relative[y - reach : y + reach + 1, x - reach : x + reach + 1]
        if around.max() - around.min() <= _SMOOTH:
            values[cell] = relative[y, x]
    return values


def draw_questions(readings: np.ndarray, kind: str, rng: np.random.Generator) -> Iterator[PointQuestion]:
    """Whole fair sets until no more are found; every picture is used at most once.

    Args:
        readings: (pictures, CELLS), of `read_cells`.
    """
    free = np.ones(len(readings), dtype=bool)
    fruitless = 0
    while fruitless < _FRUITLESS and free.any():
        count = int(rng.choice(_COUNTS[kind]))
        cells = draw_cells(count, rng)
        options = _options(readings[:, cells], free, kind)
        sets = min(_MOST, *(len(found) for found in options.values()))
        fruitless = 0 if sets else fruitless + 1
        chosen = {answer: rng.choice(found, sets, replace=False) for answer, found in options.items()}
        for number in range(sets):
            pictures = {answer: int(found[number]) for answer, found in chosen.items()}
            free[list(pictures.values())] = False
            yield from _one_set(pictures, cells, kind, rng)


def _options(nearness: np.ndarray, free: np.ndarray, kind: str) -> dict[tuple[int, ...], np.ndarray]:
    """{places, the nearest first: the pictures for which that is the answer}.

    Args:
        nearness: (pictures, points).
    """
    points = nearness.shape[1]
    usable = np.flatnonzero(free & ~np.isnan(nearness).any(1))
    order = np.argsort(-nearness[usable], axis=1, kind="stable")
    falling = np.take_along_axis(nearness[usable], order, axis=1)
    gaps = falling[:, :-1] - falling[:, 1:] >= MARGIN
    if kind == "order":
        clear = gaps.all(1)
        return {answer: usable[clear & (order == np.array(answer)).all(1)] for answer in permutations(range(points))}
    return {(place,): usable[gaps[:, 0] & (order[:, 0] == place)] for place in range(points)}


def _one_set(
    pictures: dict[tuple[int, ...], int], cells: np.ndarray, kind: str, rng: np.random.Generator
) -> Iterator[PointQuestion]:
    """One question for each answer in places, and in letters too each answer once."""
    letters = "ABCDE"[: len(cells)]
    said = list(permutations(letters, len(next(iter(pictures)))))
    rng.shuffle(said)
    for (places, picture), answer in zip(pictures.items(), map(tuple, said), strict=True):
        others = [letter for letter in letters if letter not in answer]
        rng.shuffle(others)
        rest = [place for place in range(len(cells)) if place not in places]
        named = dict(zip((*answer, *others), (*places, *rest), strict=True))
        marked = tuple(int(cells[named[letter]]) for letter in letters)
        yield PointQuestion(kind, picture, marked, tuple(letters), answer)


def rule_shares(questions: list[PointQuestion]) -> tuple[float, dict[str, float]]:
    """How often one is right by chance, and how often by rules that need no depth."""
    chance = float(np.mean([1 / perm(len(q.letters), len(q.answer)) for q in questions]))
    rules = {"lowest": (-1, 0), "highest": (1, 0), "most_central": (0, 1)}
    shares = {
        name: float(np.mean([_by(q, *weights) == q.answer for q in questions])) for name, weights in rules.items()
    }
    answers = [q.answer for q in questions]
    shares["most_frequent_answer"] = max(answers.count(answer) for answer in set(answers)) / len(answers)
    return chance, shares


def _by(question: PointQuestion, down: int, central: int) -> tuple[str, ...]:
    """The answer by places alone: from the top (1) or the bottom (-1), or from the middle."""

    def rank(letter: str) -> tuple[float, int]:
        cell = question.cells[question.letters.index(letter)]
        row, column = divmod(cell, GRID)
        middle = (GRID - 1) / 2
        return down * row + central * ((row - middle) ** 2 + (column - middle) ** 2), cell

    return tuple(sorted(question.letters, key=rank)[: len(question.answer)])
