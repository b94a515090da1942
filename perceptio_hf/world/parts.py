"""The records that a scene is built of before it is drawn, and the two random draws that everything uses."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from .geometry import Camera, Solid, dot

T = TypeVar("T")
Color = tuple[float, float, float]  # linear light, 0 to 1


@dataclass(frozen=True)
class Texture:
    """How a flat surface looks: `kind` is plain, checker, stripes, tiles or grain; `scale` is in metres."""

    kind: str
    first: Color
    second: Color
    scale: float
    angle: float
    mottle: float
    shift: tuple[int, int]


@dataclass(frozen=True)
class Plane:
    """A bounding plane `normal . point = offset` of the room, the normal pointing out of it.

    `surface` is its index in SURFACES.
    """

    normal: tuple[float, float, float]
    offset: float
    surface: int
    texture: Texture


@dataclass(frozen=True)
class Light:
    """A distant lamp (`direction` points to it) and the light that comes from everywhere."""

    direction: tuple[float, float, float]
    color: Color
    ambient: Color


@dataclass(frozen=True)
class Thing:
    """An object to draw and to talk about."""

    solid: Solid
    shape: str
    color: str
    size: str
    material: str
    tint: Color


@dataclass(frozen=True)
class Layout:
    """A scene to draw at any size."""

    camera: Camera
    planes: tuple[Plane, ...]
    light: Light
    things: tuple[Thing, ...]
    platform: Solid | None
    noise: float  # standard deviation of the sensor noise in grey values of 255


def pick(r: random.Random, options: Sequence[T]) -> T:
    """One of `options`; unlike `random.choice` the same in every version of Python."""
    return options[int(r.random() * len(options))]


def between(r: random.Random, low: float, high: float) -> float:
    """Uniform in [low, high)."""
    return low + (high - low) * r.random()


def weighted(r: random.Random, weights: Sequence[float]) -> int:
    """An index drawn in proportion to `weights`."""
    lot = between(r, 0, sum(weights))
    for index, weight in enumerate(weights):
        lot -= weight
        if lot < 0:
            return index
    return len(weights) - 1


def inside_room(solid: Solid, planes: Sequence[Plane]) -> bool:
    """Whether a solid keeps 5 cm from all walls."""
    return all(dot(p.normal, solid.middle) + solid.spread + 0.05 < p.offset for p in planes if p.surface != 0)
