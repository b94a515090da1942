"""Sets of marked points without shortcuts: nothing but depth tells which point is the nearest.

For a set of places, one scene is drawn for every place in it in which that place is the nearest. Given the places,
then, each of them is right equally often: rules on positions ("the lowest is nearest", "the most central") score
exactly 1 / n, however near things usually stand low in pictures. All places of a set lie in neighbouring rows.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .render import render_scene
from .scene import HELD_OUT_SEED, Scene

FAIR_RATIO = 1.25  # the second nearest point is at least this much farther
GRID = 8
_SMOOTH = 0.05  # largest spread of depth around a point, relative
_REACH = 2  # pixels around a point, of a picture of 128 x 128, that its depth must hold for
_TRIES = 20_000


@dataclass(frozen=True)
class FairSet:
    """Points (x, y) marked with `letters` in scene `seed`; `answer` is the letter of the nearest."""

    seed: int
    points: tuple[tuple[int, int], ...]
    letters: tuple[str, ...]
    answer: str

    @property
    def lowest(self) -> str:
        """The letter that "the lowest point is the nearest" would name; of equally low ones the first."""
        return self.letters[int(np.argmax([y for _, y in self.points]))]


def fair_sets(
    points: int,
    count: int,
    *,
    scenes: int | None = None,
    first_seed: int = HELD_OUT_SEED,
    size: int = 128,
    seed: int = 0,
) -> list[FairSet]:
    """At least `count` questions with `points` points each, in whole sets, over the scenes from `first_seed` on.

    Every scene is used at most once. By default six scenes are looked at for every question; a process that asks again
    about the same scenes does not render them again.

    Raises:
        ValueError: if the scenes do not give that many.
    """
    depths = _depths(max(600, 6 * count) if scenes is None else scenes, first_seed, size)
    return _draw_sets(depths, points, count, first_seed, size, np.random.default_rng([seed, points]))


@lru_cache(maxsize=2)
def _depths(scenes: int, first_seed: int, size: int) -> np.ndarray:
    """(scenes, cells) depth in metres at the centres of all cells, NaN where it is not smooth."""
    return np.stack([_smooth_depths(render_scene(first_seed + k, size=size)) for k in range(scenes)])


def _draw_sets(
    depths: np.ndarray, points: int, count: int, first_seed: int, size: int, rng: np.random.Generator
) -> list[FairSet]:
    free = np.ones(len(depths), dtype=bool)
    found: list[FairSet] = []
    for _ in range(_TRIES):
        cells = draw_cells(points, rng)
        among = depths[:, cells]
        second = np.partition(among, 1, axis=1)[:, 1]  # NaN sorts last: a row with any NaN is left out below
        clear = free & ~np.isnan(among).any(1) & (second >= FAIR_RATIO * among.min(1))
        nearest = np.where(clear, np.where(np.isnan(among), np.inf, among).argmin(1), -1)
        options = [np.flatnonzero(nearest == place) for place in range(points)]
        if min(map(len, options)) == 0:
            continue
        for place, chosen in enumerate(int(rng.choice(option)) for option in options):
            free[chosen] = False
            found.append(_fair_set(first_seed + chosen, cells, place, size, rng))
        if len(found) >= count:
            return found
    raise ValueError(
        f"{len(depths)} scenes gave {len(found)} fair questions with {points} points, {count} were asked for: "
        "give more scenes."
    )


def draw_cells(points: int, rng: np.random.Generator) -> np.ndarray:
    """Different cells off the border, in rows at most one from a base row."""
    base = rng.integers(2, GRID - 2)
    rows, columns = np.meshgrid(np.arange(base - 1, base + 2), np.arange(1, GRID - 1), indexing="ij")
    return rng.choice((rows * GRID + columns).ravel(), points, replace=False)


def _fair_set(seed: int, cells: np.ndarray, nearest: int, size: int, rng: np.random.Generator) -> FairSet:
    letters = rng.permutation(list("ABCDEFGH"[: len(cells)]))
    order = np.argsort(letters)
    centers = [cell_center(int(cell), size) for cell in cells]
    return FairSet(
        seed=seed,
        points=tuple(centers[index] for index in order),
        letters=tuple(str(letters[index]) for index in order),
        answer=str(letters[nearest]),
    )


def cell_center(cell: int, width: int, height: int | None = None) -> tuple[int, int]:
    """(x, y) of the middle of a cell; without a height, of a square."""
    row, column = divmod(cell, GRID)
    return (2 * column + 1) * width // (2 * GRID), (2 * row + 1) * (height or width) // (2 * GRID)


def _smooth_depths(scene: Scene) -> np.ndarray:
    """(cells,) depth in metres at the centre of every cell, NaN where it is not smooth around it."""
    reach = max(1, round(_REACH * scene.size / 128))
    values = np.full(GRID * GRID, np.nan)
    for cell in range(GRID * GRID):
        x, y = cell_center(cell, scene.size)
        around = scene.depth[y - reach : y + reach + 1, x - reach : x + reach + 1]
        if around.max() - around.min() <= _SMOOTH * scene.depth[y, x]:
            values[cell] = scene.depth[y, x]
    return values
