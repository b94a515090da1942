"""Marked points: choosing them so that no simple rule finds the nearest, and drawing them as HardBLINK does."""

import random
from collections.abc import Sequence

import numpy as np

from .balance import draw_fair, surprise
from .parts import pick, weighted
from .scene import SURFACES, Scene

POINT_RATIO = 1.15  # the second nearest point is at least this much farther
_BORDER, _APART = 0.07, 0.085  # shares of the picture's width: free border, distance between points
_ROUGHNESS = 0.04  # largest spread of depth in the 3 x 3 pixels around a point, relative
_POOL = 12  # candidates per object, and three times as many on floor and walls
_PROPOSALS = 12

# Weights of the choice model for `_features`: fitted to what `_Pool.propose` gives, then moved until no rule on
# positions alone was right more than a few points above chance in what is asked.
SHORTCUTS = (6.0, 4.5, 10.3, 2.2, 0.2, -10.0, 1.9)
_LIMIT, _ENOUGH = 25.0, 3.3  # see `draw_fair`
_LOWEST = 0.72  # sets in which the nearest is the lowest are found more easily, so they are tried less often


def choose_points(scene: Scene, r: random.Random) -> list[tuple[int, int]] | None:
    """3 to 5 points (x, y), the nearest first, or None where the scene gave no good set.

    The number of points and the place of the nearest in the order from bottom to top are drawn first, only where every
    place seems possible, and so that all come out equally often: "the lowest is nearest" is right once in n questions.
    Among proposals of that kind the choice goes by the other shortcuts (see `balance`).
    """
    pool = _candidates(scene, r)
    feasible = [count for count in (3, 4, 5) if pool.allows_every_rank(count)]
    if not feasible:
        return None
    count = pick(r, feasible)
    rank = weighted(r, [_LOWEST] + [1.0] * (count - 1))
    proposals = [chosen for chosen in (pool.propose(r, count, rank) for _ in range(_PROPOSALS)) if chosen]
    surprises = [surprise([pool.features[i] for i in chosen], SHORTCUTS, 0) for chosen in proposals]
    index = draw_fair(r, surprises, _LIMIT, _ENOUGH)
    return None if index is None else [pool.points[i] for i in proposals[index]]


class _Pool:
    """Candidate points and, for every pair (i, j) of them, whether j can accompany i as the nearest."""

    def __init__(self, scene: Scene, x: np.ndarray, y: np.ndarray):
        size, depth = scene.size, scene.depth[y, x]
        self.points = list(zip(x.tolist(), y.tolist(), strict=True))
        self.on_object = scene.instances[y, x] > 0
        self.features = _features(scene, x, y)
        dx, dy = x[None, :] - x[:, None], y[None, :] - y[:, None]
        self.apart = dx * dx + dy * dy >= (_APART * size) ** 2
        fits = self.apart & (depth[None, :] >= depth[:, None] * POINT_RATIO)
        least = max(1, round(size / 64))
        self.below, self.above = fits & (dy >= least), fits & (dy <= -least)
        self.count_below, self.count_above = self.below.sum(1), self.above.sum(1)

    def allows_every_rank(self, count: int) -> bool:
        """Whether for each number of points below it, 0 to count - 1, some nearest point seems possible."""
        ranks = range(count)
        return all(((self.count_below >= 3 * k) & (self.count_above >= 3 * (count - 1 - k))).any() for k in ranks)

    def propose(self, r: random.Random, count: int, rank: int) -> list[int] | None:
        """A random set whose first is the nearest and has `rank` of the others below it, or None."""
        heads = (self.count_below >= rank) & (self.count_above >= count - 1 - rank)
        head = self._pick(r, heads, 0.7)
        if head is None:
            return None
        chosen, free = [head], self.apart[head]
        for side in [self.below[head]] * rank + [self.above[head]] * (count - 1 - rank):
            index = self._pick(r, side & free, 0.92)
            if index is None:
                return None
            chosen.append(index)
            free = free & self.apart[index]
        return chosen

    def _pick(self, r: random.Random, allowed: np.ndarray, objects: float) -> int | None:
        """One of the allowed candidates, preferring one on an object in a share `objects` of the cases."""
        preferred = allowed & (self.on_object == (r.random() < objects))
        numbers = np.flatnonzero(preferred)
        if not numbers.size:
            numbers = np.flatnonzero(allowed)
        return int(pick(r, numbers)) if numbers.size else None


def _features(scene: Scene, x: np.ndarray, y: np.ndarray) -> list[list[float]]:
    """What can be seen of a point without depth, one row of numbers each, for the choice model."""
    across, down = x / scene.size - 0.5, y / scene.size - 0.5
    number, surface = scene.instances[y, x], scene.surfaces[y, x]
    extent = np.log([1.0] + [o.pixels / scene.size**2 for o in scene.objects])[number]  # 0 on the background
    on_object, on_ground = number > 0, (number == 0) & (surface == 0)
    columns = (
        across * across,
        down * down,
        on_object,
        extent,
        on_ground,
        (number == 0) & (surface == SURFACES.index("back wall")),
        (number == 0) & (surface == SURFACES.index("platform")),
    )
    return np.stack(columns, 1).tolist()


def _candidates(scene: Scene, r: random.Random) -> _Pool:
    """Random visible places on every object and on floor and walls, inside the border and where depth is smooth."""
    size, flat = scene.size, scene.instances.ravel()
    rng = np.random.default_rng(int(r.random() * 2**53))
    places = [rng.integers(size * size, size=3 * _POOL)]
    for number in range(1, len(scene.objects) + 1):
        inside = np.flatnonzero(flat == number)
        places.append(inside[rng.integers(inside.size, size=_POOL)])
    y, x = np.divmod(np.concatenate(places), size)
    border = max(int(_BORDER * size), 8)
    keep = (np.minimum(x, y) >= border) & (np.maximum(x, y) < size - border)
    x, y = x[keep], y[keep]
    around = np.array([-1, 0, 1])
    rows, columns = y[:, None, None] + around[:, None], x[:, None, None] + around
    depth, owner = scene.depth[rows, columns], scene.instances[rows, columns]
    smooth = depth.max((1, 2)) - depth.min((1, 2)) <= _ROUGHNESS * depth[:, 1, 1]
    smooth &= (owner == owner[:, 1:2, 1:2]).all((1, 2))
    return _Pool(scene, x[smooth], y[smooth])


_GLYPHS = {  # 5 x 7, one number of 5 bits per row
    "A": (14, 17, 17, 31, 17, 17, 17),
    "B": (30, 17, 17, 30, 17, 17, 30),
    "C": (14, 17, 16, 16, 16, 17, 14),
    "D": (30, 17, 17, 17, 17, 17, 30),
    "E": (31, 16, 16, 30, 16, 16, 31),
    "F": (31, 16, 16, 30, 16, 16, 16),
    "G": (14, 17, 16, 23, 17, 17, 14),
    "H": (17, 17, 17, 31, 17, 17, 17),
}
_RED, _WHITE = (255, 0, 0), (255, 255, 255)


def draw_points(image: np.ndarray, points: Sequence[tuple[int, int]], letters: Sequence[str]) -> np.ndarray:
    """A copy of `image` (uint8, height x width x 3) with a red circle at each (x, y) and its letter beside it.

    A letter stands white on black above its circle, or where it covers neither a circle nor another letter.
    """
    _check_points(image, points, letters)
    picture = image.copy()
    height, width = image.shape[:2]
    scale = max(1, round(min(height, width) / 150))
    radius = 3 * scale
    reach = radius + scale  # of a circle: the picture may have a hundred million pixels
    for x, y in points:
        left, top = max(0, x - reach), max(0, y - reach)
        around = picture[top : y + reach + 1, left : x + reach + 1]
        ys, xs = np.ogrid[top : top + around.shape[0], left : left + around.shape[1]]
        around[np.abs(np.hypot(ys - y, xs - x) - radius) <= max(0.5, 0.6 * scale)] = _RED
    taken = [(x - radius, y - radius, x + radius + 1, y + radius + 1) for x, y in points]
    for (x, y), letter in zip(points, letters, strict=True):
        label = _label(letter, scale)
        box = _label_place(x, y, radius, label.shape, (height, width), taken)
        picture[box[1] : box[3], box[0] : box[2]] = label
        taken.append(box)
    return picture


def _check_points(image: np.ndarray, points: Sequence[tuple[int, int]], letters: Sequence[str]) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 32:
        raise ValueError(
            f"got an image {image.dtype} {image.shape}, expected uint8 (height, width, 3) of at least 32 pixels"
        )
    if len(points) != len(letters):
        raise ValueError(f"got {len(points)} points and {len(letters)} letters: give one letter for each point")
    unknown = [letter for letter in letters if letter not in _GLYPHS]
    if unknown:
        raise ValueError(f"cannot draw the letters {unknown}: use {' '.join(_GLYPHS)}")
    height, width = image.shape[:2]
    outside = [(x, y) for x, y in points if not (0 <= x < width and 0 <= y < height)]
    if outside:
        raise ValueError(f"points {outside} lie outside of the picture, which is {width} wide and {height} high")


def _label(letter: str, scale: int) -> np.ndarray:
    """uint8 (9 scale, 7 scale, 3): the letter in white on black."""
    bits = np.array([[row >> (4 - column) & 1 for column in range(5)] for row in _GLYPHS[letter]], bool)
    bits = np.kron(np.pad(bits, 1), np.ones((scale, scale), bool))
    return np.where(bits[..., None], np.uint8(_WHITE), np.uint8(0))


def _label_place(
    x: int,
    y: int,
    radius: int,
    shape: tuple[int, ...],
    limits: tuple[int, int],
    taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1) of a label: the first of eight places around the circle that is free, or the least covered."""
    high, wide = shape[:2]
    gap = radius + 1
    left, right, middle = x - gap - wide, x + gap + 1, x - wide // 2
    top, bottom, beside = y - gap - high, y + gap + 1, y - high // 2
    corners = (
        (middle, top),
        (right, beside),
        (left, beside),
        (middle, bottom),
        (right, top),
        (left, top),
        (right, bottom),
    )
    boxes = []
    for x0, y0 in corners:
        x0, y0 = min(max(x0, 0), limits[1] - wide), min(max(y0, 0), limits[0] - high)
        boxes.append((x0, y0, x0 + wide, y0 + high))
    return min(boxes, key=lambda box: sum(_overlap(box, other) for other in taken))


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    """Pixels that two boxes share."""
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
