"""Where objects go: on the ground, on a platform, on each other or in the air, never through one another.

In plain rooms near things are low in the picture and cover many pixels. Here near objects are more often small and
more often float, so that place and extent in the picture say less about depth.
"""

import math
import random
from collections.abc import Sequence

from .geometry import Camera, Solid
from .parts import Color, Plane, Thing, between, inside_room, pick
from .scene import COLORS, MATERIALS, SHAPES, SIZES

NEAREST, DEEPEST = 1.75, 6.3  # metres from the camera along the ground to the axes of objects
RADII = {"small": (0.18, 0.23), "large": (0.36, 0.44)}  # metres; far enough apart to be told by eye
TALLNESS = {"ball": (2.0, 2.0), "box": (1.7, 2.2), "cylinder": (2.0, 2.7), "cone": (2.3, 3.0)}  # heights / radius

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


class Placer:
    """Draws the objects of one scene."""

    def __init__(self, r: random.Random, camera: Camera, planes: Sequence[Plane], platform: Solid | None):
        self.r, self.camera, self.planes, self.platform = r, camera, planes, platform
        self.solids: list[Solid] = []

    def draw_things(self) -> list[Thing]:
        """2 to 7 objects; fewer where no free place is found. Some scenes have few colours, shapes, sizes or materials,
        so that larger counts occur for every kind of description."""
        r = self.r
        palette = [pick(r, COLORS) for _ in range(pick(r, (1, 2, 3, 8)))]
        shapes = [pick(r, SHAPES) for _ in range(pick(r, (1, 2, 4)))]
        large, shiny = pick(r, (0.1, 0.5, 0.5, 0.9)), pick(r, (0.15, 0.5, 0.5, 0.85))
        things = []
        for _ in range(2 + int(r.random() * 6)):
            shape = pick(r, shapes if r.random() < 0.85 else SHAPES)
            color = pick(r, palette if r.random() < 0.85 else COLORS)
            material = MATERIALS[r.random() < shiny]
            found = self._place(shape, large)
            if found is not None:
                size, solid = found
                self.solids.append(solid)
                things.append(Thing(solid, shape, color, size, material, self._tint(color)))
        return things

    def _tint(self, color: str) -> Color:
        bright = between(self.r, 0.85, 1.12)
        return tuple(c * bright * between(self.r, 0.93, 1.07) for c in _TINTS[color])

    def _place(self, shape: str, large: float) -> tuple[str, Solid] | None:
        """The size and place of one more object, or None if a dozen tries found no free place."""
        r = self.r
        for _ in range(12):
            z = NEAREST + (DEEPEST - NEAREST) * r.random() ** 1.3
            size = SIZES[r.random() < large + 0.3 * (z - 3.3)]
            radius = between(r, *RADII[size])
            x, y, z = self._spot(size, z)
            height = radius * between(r, *TALLNESS[shape])
            solid = Solid(shape, x, y, z, radius, radius, height, between(r, 0, math.pi / 2))
            if self._is_free(solid):
                return size, solid
        return None

    def _spot(self, size: str, z: float) -> tuple[float, float, float]:
        """Where to try an object about `z` metres away: x, y of its bottom, z."""
        r, platform = self.r, self.platform
        if platform is not None and r.random() < 0.3:
            return platform.x + between(r, -0.7, 0.7) * platform.rx, platform.height, platform.z
        if size == "small" and r.random() < 0.25:
            bases = [s for s in self.solids if s.shape in ("box", "cylinder") and s.rx > RADII["small"][1]]
            if bases:
                base = pick(r, bases)
                return base.x + between(r, -0.1, 0.1), base.y + base.height, base.z + between(r, -0.1, 0.1)
        x = between(r, -0.95, 0.95) * z * self.camera.tan_half
        floats = r.random() < 0.9 - 0.17 * z
        return x, between(r, 0.2, 1.8) if floats else 0.0, z

    def _is_free(self, solid: Solid) -> bool:
        obstacles = [*self.solids, self.platform] if self.platform else self.solids
        in_room = self._in_view(solid) and inside_room(solid, self.planes)
        return in_room and not any(_touch(solid, other) for other in obstacles)

    def _in_view(self, solid: Solid) -> bool:
        x, y, z = self.camera.project(solid.middle)
        reach = 0.85 * solid.bound / (max(z, 0.1) * self.camera.tan_half)
        return z - solid.bound > 1.2 and max(abs(x), abs(y)) + reach < 1


def _touch(a: Solid, b: Solid) -> bool:
    """Whether two solids may meet: their heights overlap and, seen from above, their circles do."""
    if a.y >= b.y + b.height - 1e-6 or b.y >= a.y + a.height - 1e-6:
        return False
    return math.hypot(a.x - b.x, a.z - b.z) < a.spread + b.spread + 0.02
