"""Random scenes before they are drawn: camera, room, light and objects that stand, float or are stacked.

Everything is drawn from `random.Random(seed)`, so a scene does not depend on the picture's size.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from perceptio_hf.data.world.geometry import Camera, Solid, Vector, dot, enter, unit, window
from perceptio_hf.data.world.scene import COLORS, MATERIALS, SHAPES, SIZES

T = TypeVar("T")

NEAR, FAR = 1.5, 9.0  # metres of z-depth between which everything lies, but for the ground at the lower border
MAX_OBJECTS = 6
RADII = {"small": (0.18, 0.23), "large": (0.36, 0.44)}  # metres; far enough apart to be told by eye
TALLNESS = {"ball": (2.0, 2.0), "box": (1.7, 2.2), "cylinder": (2.0, 2.7), "cone": (2.3, 3.0)}  # heights / radius

PROBE_SIZE = 64
PROBE_PIXELS = 13  # of the probe; an object showing less is taken away
PROBE_SHARE = 0.5  # of what the object would show alone

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
    """A bounding plane `normal . point = offset` of the room, the normal pointing out of it; `surface` as in SURFACES."""

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


_TINTS: dict[str, Color] = {
    "red": (0.62, 0.025, 0.02),
    "orange": (0.90, 0.24, 0.01),
    "yellow": (0.88, 0.70, 0.03),
    "green": (0.04, 0.36, 0.05),
    "cyan": (0.03, 0.60, 0.62),
    "blue": (0.02, 0.07, 0.58),
    "purple": (0.26, 0.03, 0.38),
    "white": (0.88, 0.88, 0.86),
}


def pick(r: random.Random, options: Sequence[T]) -> T:
    """One of `options`; unlike `random.choice` the same in every version of Python."""
    return options[int(r.random() * len(options))]


def between(r: random.Random, low: float, high: float) -> float:
    """Uniform in [low, high)."""
    return low + (high - low) * r.random()


def make_layout(seed: int) -> Layout:
    """The scene of a seed: the first draw that shows at least two objects well."""
    r = random.Random(seed)
    while True:
        layout = _draw_layout(r)
        if len(layout.things) >= 2:
            return layout


def _draw_layout(r: random.Random) -> Layout:
    camera = _draw_camera(r)
    planes = _draw_room(r, camera)
    platform = _draw_platform(r, camera, planes) if r.random() < 0.35 else None
    things = _draw_things(r, camera, planes, platform)
    things = keep_visible(things, platform, camera)[:MAX_OBJECTS]
    return Layout(camera, planes, _draw_light(r), tuple(things), platform, between(r, 1.0, 4.0))


def _draw_camera(r: random.Random) -> Camera:
    height = between(r, 0.75, 2.4)
    aim = between(r, 2.6, 4.2)  # metres ahead, where the optical axis passes 0.45 m above the ground
    pitch = math.atan2(height - 0.45, aim) + between(r, -0.05, 0.05)
    return Camera(height, pitch, between(r, -0.04, 0.04), math.tan(math.radians(between(r, 46, 62)) / 2))


def _draw_room(r: random.Random, camera: Camera) -> tuple[Plane, ...]:
    planes = [Plane((0.0, -1.0, 0.0), 0.0, 0, _draw_texture(r, ground=True))]
    yaw = between(r, -0.3, 0.3)
    back = (math.sin(yaw), 0.0, math.cos(yaw))
    planes.append(Plane(back, min(between(r, 4.6, 7.5), _farthest(camera, back)), 1, _draw_texture(r)))
    sides = pick(r, ((), (), (-1,), (1,), (-1, 1)))
    for side in sides:
        normal = (side * math.cos(yaw), 0.0, -side * math.sin(yaw))
        planes.append(Plane(normal, between(r, 1.5, 3.0), 2 if side < 0 else 3, _draw_texture(r)))
    return tuple(planes)


def _farthest(camera: Camera, normal: Vector) -> float:
    """The largest offset of a wall that keeps every corner of the picture nearer than FAR."""
    return FAR * float(camera.linear(2, normal).min() * 0.98 - 0.02) + dot(normal, camera.origin)


def _draw_texture(r: random.Random, ground: bool = False) -> Texture:
    first = _muted(r, 0.10, 0.50)
    contrast = between(r, 0.55, 0.85)
    second = tuple(c * contrast * between(r, 0.92, 1.08) for c in first)
    kinds = ("plain", "checker", "stripes", "tiles", "grain") if ground else ("plain", "plain", "stripes", "grain", "tiles")
    shift = (int(r.random() * 256), int(r.random() * 256))
    return Texture(pick(r, kinds), first, second, between(r, 0.4, 0.9), between(r, 0, 3.1), between(r, 0.05, 0.3), shift)


def _muted(r: random.Random, low: float, high: float) -> Color:
    """A greyish colour, so that floor and walls are not taken for objects."""
    value, saturation, hue = between(r, low, high), between(r, 0.0, 0.35), between(r, 0, 2 * math.pi)
    return tuple(value * (1 + saturation * math.cos(hue + k * 2 * math.pi / 3)) for k in range(3))


def _draw_light(r: random.Random) -> Light:
    turn, rise = between(r, -1.25, 1.25), between(r, 0.55, 1.2)  # from behind the camera, left or right of it
    direction = (math.sin(turn) * math.cos(rise), math.sin(rise), -math.cos(turn) * math.cos(rise))
    warmth, strength, fill = between(r, -0.1, 0.1), between(r, 0.75, 1.25), between(r, 0.22, 0.5)
    color = (strength * (1 + warmth), strength, strength * (1 - warmth))
    return Light(unit(direction), color, (fill * (1 - warmth / 2), fill, fill * (1 + warmth / 2)))


def _draw_platform(r: random.Random, camera: Camera, planes: Sequence[Plane]) -> Solid | None:
    for _ in range(6):
        z, rx, rz = between(r, 2.8, 5.5), between(r, 0.55, 1.1), between(r, 0.4, 0.6)
        x = between(r, -0.8, 0.8) * z * camera.tan_half
        solid = Solid("box", x, 0.0, z, rx, rz, between(r, 0.25, 0.8), between(r, -0.4, 0.4))
        if _inside_room(solid, planes):
            return solid
    return None


def _draw_things(r: random.Random, camera: Camera, planes: Sequence[Plane], platform: Solid | None) -> list[Thing]:
    # Few colours and shapes in some scenes, so that larger counts occur for every kind of description.
    palette = [pick(r, COLORS) for _ in range(pick(r, (1, 2, 3, 8)))]
    shapes = [pick(r, SHAPES) for _ in range(pick(r, (1, 2, 4)))]
    large, shiny = pick(r, (0.15, 0.5, 0.5, 0.85)), pick(r, (0.15, 0.5, 0.5, 0.85))
    things: list[Thing] = []
    for _ in range(2 + int(r.random() * 6)):
        shape = pick(r, shapes if r.random() < 0.85 else SHAPES)
        color = pick(r, palette if r.random() < 0.85 else COLORS)
        size, material = SIZES[r.random() < large], MATERIALS[r.random() < shiny]
        solid = _place(r, shape, size, camera, planes, [t.solid for t in things], platform)
        if solid is not None:
            things.append(Thing(solid, shape, color, size, material, _jitter(r, _TINTS[color])))
    return things


def _jitter(r: random.Random, tint: Color) -> Color:
    bright = between(r, 0.85, 1.12)
    return tuple(c * bright * between(r, 0.93, 1.07) for c in tint)


def _place(
    r: random.Random,
    shape: str,
    size: str,
    camera: Camera,
    planes: Sequence[Plane],
    others: Sequence[Solid],
    platform: Solid | None,
) -> Solid | None:
    """A free place for one more object, or None if a dozen tries found none."""
    radius = between(r, *RADII[size])
    height = radius * between(r, *TALLNESS[shape])
    obstacles = [*others, platform] if platform else others
    for _ in range(12):
        x, y, z = _draw_spot(r, size, camera, others, platform)
        solid = Solid(shape, x, y, z, radius, radius, height, between(r, 0, math.pi / 2))
        if _in_view(solid, camera) and _inside_room(solid, planes) and not any(_touch(solid, o) for o in obstacles):
            return solid
    return None


def _draw_spot(
    r: random.Random, size: str, camera: Camera, others: Sequence[Solid], platform: Solid | None
) -> tuple[float, float, float]:
    """Where to try: on the platform, on a box or cylinder, in the air, or (mostly) on the ground."""
    lot = r.random()
    if platform is not None and lot < 0.3:
        return platform.x + between(r, -0.7, 0.7) * platform.rx, platform.height, platform.z
    if size == "small" and lot < 0.5:
        bases = [o for o in others if o.shape in ("box", "cylinder") and o.rx > RADII["small"][1]]
        if bases:
            base = pick(r, bases)
            return base.x + between(r, -0.1, 0.1), base.y + base.height, base.z + between(r, -0.1, 0.1)
    z = NEAR + 0.3 + 4.7 * r.random() ** 1.3
    x = between(r, -0.95, 0.95) * z * camera.tan_half
    return x, (between(r, 0.25, 1.5) if lot > 0.75 else 0.0), z


def _in_view(solid: Solid, camera: Camera) -> bool:
    x, y, z = camera.project(solid.middle)
    reach = 0.85 * solid.bound / (max(z, 0.1) * camera.tan_half)
    return z - solid.bound > NEAR * 0.8 and max(abs(x), abs(y)) + reach < 1


def _inside_room(solid: Solid, planes: Sequence[Plane]) -> bool:
    return all(dot(p.normal, solid.middle) + solid.spread + 0.05 < p.offset for p in planes if p.surface != 0)


def _touch(a: Solid, b: Solid) -> bool:
    """Whether two solids may meet: their heights overlap and, seen from above, their circles do."""
    if a.y >= b.y + b.height - 1e-6 or b.y >= a.y + a.height - 1e-6:
        return False
    return math.hypot(a.x - b.x, a.z - b.z) < a.spread + b.spread + 0.02


def keep_visible(things: Sequence[Thing], platform: Solid | None, camera: Camera) -> list[Thing]:
    """The things that show well: enough pixels, and enough of what they would show alone, at PROBE_SIZE pixels."""
    directions = camera.directions(PROBE_SIZE)
    depth = np.full((PROBE_SIZE, PROBE_SIZE), np.inf, np.float32)
    owner = np.zeros((PROBE_SIZE, PROBE_SIZE), np.uint8)
    solids = [t.solid for t in things] + ([platform] if platform else [])
    alone = []
    for number, solid in enumerate(solids, 1):
        where = window(solid, camera, PROBE_SIZE)
        t = enter(solid, camera.origin, tuple(d[where] for d in directions))
        alone.append(int(np.count_nonzero(t < np.inf)))
        nearer = t < depth[where]
        depth[where][nearer] = t[nearer]
        owner[where][nearer] = number
    seen = np.bincount(owner.ravel(), minlength=len(solids) + 1)[1:]
    return [t for t, s, a in zip(things, seen, alone, strict=False) if s >= PROBE_PIXELS and s >= PROBE_SHARE * a]
