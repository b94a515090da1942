"""Random scenes before they are drawn: camera, room, light and objects.

Everything is drawn from `random.Random(seed)`, so a scene does not depend on the picture's size.
"""

import math
import random
from collections.abc import Sequence

import numpy as np

from .geometry import Camera, Solid, Vector, dot, enter, unit, window
from .parts import Color, Layout, Light, Plane, Texture, Thing, between, inside_room, pick
from .placement import Placer

FAR = 9.0  # metres of z-depth within which everything lies
MAX_OBJECTS = 6

PROBE_SIZE = 64
PROBE_PIXELS = 13  # of the probe; an object showing less is taken away
PROBE_SHARE = 0.5  # of what the object would show alone


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
    things = keep_visible(Placer(r, camera, planes, platform).draw_things(), platform, camera)[:MAX_OBJECTS]
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
    kinds = (
        ("plain", "checker", "stripes", "tiles", "grain") if ground else ("plain", "plain", "stripes", "grain", "tiles")
    )
    shift = (int(r.random() * 256), int(r.random() * 256))
    return Texture(
        pick(r, kinds), first, second, between(r, 0.4, 0.9), between(r, 0, 3.1), between(r, 0.05, 0.3), shift
    )


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
        if inside_room(solid, planes):
            return solid
    return None


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
