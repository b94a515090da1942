"""Solids, the camera, and where rays meet solids.

World coordinates are metres: x to the right, y up, z away from the camera, the ground at y = 0. A ray is
`origin + t * direction`; camera rays are (u, v, 1) in camera coordinates, so for them t *is* the metric z-depth.
Vectors are tuples of three numbers or arrays, which broadcast: one origin with many directions (camera rays) and many
origins with one direction (shadow rays) go through the same code.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Vector = tuple[Any, Any, Any]  # three floats or three float32 arrays that broadcast together

_INF = np.float32(np.inf)


def dot(a: Vector, b: Vector) -> Any:
    """Scalar product of two vectors."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def unit(a: tuple[float, float, float]) -> tuple[float, float, float]:
    """`a` scaled to length 1."""
    length = math.sqrt(dot(a, a))
    return a[0] / length, a[1] / length, a[2] / length


@dataclass(frozen=True)
class Camera:
    """A pinhole camera above the ground at x = z = 0; angles in radians, `pitch` > 0 looks down, square pictures."""

    height: float
    pitch: float
    roll: float
    tan_half: float  # tangent of half the field of view

    @property
    def origin(self) -> tuple[float, float, float]:
        return 0.0, self.height, 0.0

    @cached_property
    def axes(self) -> tuple[Vector, Vector, Vector]:
        """World directions of the camera's right, down and forward."""
        sp, cp, sr, cr = math.sin(self.pitch), math.cos(self.pitch), math.sin(self.roll), math.cos(self.roll)
        return (cr, -sr * cp, -sr * sp), (-sr, -cr * cp, -cr * sp), (0.0, -sp, cp)

    def project(self, point: Vector) -> tuple[float, float, float]:
        """(x, y, z-depth) of a world point; x and y run from -1 to 1 across the picture, y downwards."""
        right, down, forward = self.axes
        offset = (point[0], point[1] - self.height, point[2])
        z = dot(offset, forward)
        scale = 1.0 / (z * self.tan_half)
        return dot(offset, right) * scale, dot(offset, down) * scale, z

    def grid(self, size: int) -> np.ndarray:
        """float32 (size,): the u (equally the v) of the pixel centres."""
        steps = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(2.0 / size) - 1
        return steps * np.float32(self.tan_half)

    def linear(self, size: int, normal: Vector) -> np.ndarray:
        """float32 (size, size): `normal . direction` for every camera ray; linear in the pixel's place."""
        right, down, forward = self.axes
        g = self.grid(size)
        across = g * np.float32(dot(right, normal))
        return (g * np.float32(dot(down, normal)) + np.float32(dot(forward, normal)))[:, None] + across

    def directions(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The world directions of all camera rays, three float32 arrays (size, size)."""
        return tuple(self.linear(size, axis) for axis in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))


@dataclass(frozen=True)
class Solid:
    """A convex solid standing upright: `x`, `z` of its axis and `y` of its bottom, in metres.

    A ball has radius `rx`; a box has half widths `rx` and `rz` and is turned by `yaw` about the vertical; a cylinder or
    cone has base radius `rx`. `height` is the whole height (for a ball 2 `rx`).
    """

    shape: str
    x: float
    y: float
    z: float
    rx: float
    rz: float
    height: float
    yaw: float = 0.0

    @property
    def middle(self) -> tuple[float, float, float]:
        return self.x, self.y + self.height / 2, self.z

    @property
    def spread(self) -> float:
        """Radius of the circle around the solid seen from above."""
        return math.hypot(self.rx, self.rz) if self.shape == "box" else self.rx

    @property
    def bound(self) -> float:
        """Radius of a sphere about `middle` that holds the solid."""
        return self.rx if self.shape == "ball" else math.hypot(self.spread, self.height / 2)


def window(solid: Solid, camera: Camera, size: int) -> tuple[slice, slice]:
    """Rows and columns of the picture outside of which camera rays miss the solid's bounding sphere."""
    x, y, z = camera.project(solid.middle)
    # A sphere's outline is an ellipse; stretching its radius by its obliquity and its closeness covers it.
    stretch = 1 + camera.tan_half**2 * (x * x + y * y)
    half = solid.bound * stretch / (max(z - solid.bound, 0.2) * camera.tan_half)
    edges = [(c + s * half + 1) * size / 2 for c in (y, x) for s in (-1, 1)]
    y0, y1, x0, x1 = (min(max(int(e), 0), size) for e in edges)
    return slice(y0, min(y1 + 1, size)), slice(x0, min(x1 + 1, size))


def enter(solid: Solid, origin: Vector, direction: Vector) -> np.ndarray:
    """The ray parameter t > 0 at which rays from outside enter the solid, inf where they miss it (float32)."""
    offset = (origin[0] - solid.x, origin[1] - solid.y, origin[2] - solid.z)
    with np.errstate(divide="ignore", invalid="ignore"):
        if solid.shape == "ball":
            return _enter_ball(solid, offset, direction)
        if solid.shape == "box":
            return _enter_box(solid, offset, direction)
        return _enter_round(solid, offset, direction)


def _enter_ball(solid: Solid, offset: Vector, direction: Vector) -> np.ndarray:
    offset = (offset[0], offset[1] - solid.rx, offset[2])
    a, b = dot(direction, direction), dot(direction, offset)
    under = b * b - a * (dot(offset, offset) - solid.rx**2)
    t = (-b - np.sqrt(under)) / a  # NaN where the ray misses
    return np.where(t > 0, t, _INF)


def _enter_box(solid: Solid, offset: Vector, direction: Vector) -> np.ndarray:
    ox, oz = turn(offset[0], offset[2], solid.yaw)
    dx, dz = turn(direction[0], direction[2], solid.yaw)
    near, far = _slab(ox, dx, -solid.rx, solid.rx)
    for o, d, low, high in ((offset[1], direction[1], 0.0, solid.height), (oz, dz, -solid.rz, solid.rz)):
        first, last = _slab(o, d, low, high)
        near, far = np.maximum(near, first), np.minimum(far, last)
    return np.where((near < far) & (near > 0), near, _INF)


def turn(x: Any, z: Any, yaw: float) -> tuple[Any, Any]:
    """World x and z in the axes of a solid turned by `yaw`."""
    c, s = math.cos(yaw), math.sin(yaw)
    return x * c + z * s, z * c - x * s


def _slab(origin: Any, direction: Any, low: float, high: float) -> tuple[Any, Any]:
    inverse = np.float32(1) / direction
    a, b = (low - origin) * inverse, (high - origin) * inverse
    return np.minimum(a, b), np.maximum(a, b)


def _enter_round(solid: Solid, offset: Vector, direction: Vector) -> np.ndarray:
    """Cylinder and cone: the radius at height y is `rx - taper * y`."""
    ox, oy, oz = offset
    dx, dy, dz = direction
    taper = solid.rx / solid.height if solid.shape == "cone" else 0.0
    radius = solid.rx - taper * oy
    a = dx * dx + dz * dz - (taper * taper) * (dy * dy)
    b = ox * dx + oz * dz + taper * radius * dy
    under = b * b - a * (ox * ox + oz * oz - radius * radius)
    root = np.sqrt(under)
    t = _where_side((-b - root) / a, oy, dy, solid.height)
    if taper:  # rays steeper than the cone enter by the other root
        t = np.minimum(t, _where_side((root - b) / a, oy, dy, solid.height))
    return np.minimum(t, _enter_cap(solid, offset, direction))


def _where_side(t: np.ndarray, oy: Any, dy: Any, height: float) -> np.ndarray:
    y = oy + t * dy
    return np.where((y >= 0) & (y <= height) & (t > 0), t, _INF)


def _enter_cap(solid: Solid, offset: Vector, direction: Vector) -> np.ndarray:
    """Through the bottom for rising rays, through the top of a cylinder for falling ones."""
    dx, dy, dz = direction
    top = solid.height if solid.shape == "cylinder" else 0.0  # a cone's top is a point: falling rays never enter there
    t = (np.where(dy > 0, np.float32(0), np.float32(top)) - offset[1]) / dy
    x, z = offset[0] + t * dx, offset[2] + t * dz
    inside = (x * x + z * z <= solid.rx**2) & (t > 0)
    if solid.shape == "cone":
        inside &= dy > 0
    return np.where(inside, t, _INF)


def normals(solid: Solid, points: Vector) -> Vector:
    """Outward unit normals at points on the solid's surface."""
    x, y, z = points[0] - solid.x, points[1] - solid.y, points[2] - solid.z
    if solid.shape == "ball":
        scale = np.float32(1 / solid.rx)
        return x * scale, (y - solid.rx) * scale, z * scale
    if solid.shape == "box":
        return _box_normals(solid, x, y, z)
    return _round_normals(solid, x, y, z)


def _box_normals(solid: Solid, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> Vector:
    lx, lz = turn(x, z, solid.yaw)
    parts = (lx / solid.rx, (y / solid.height - 0.5) * 2, lz / solid.rz)
    face = np.argmax(np.abs(np.stack(parts)), axis=0)  # the face a point lies on is where it is farthest out
    nx, ny, nz = (np.sign(part) * (face == i) for i, part in enumerate(parts))
    nx, nz = turn(nx, nz, -solid.yaw)
    return nx, ny, nz


def _round_normals(solid: Solid, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> Vector:
    taper = solid.rx / solid.height if solid.shape == "cone" else 0.0
    upward = taper / math.hypot(1, taper)
    outward = math.sqrt(1 - upward * upward) / np.maximum(np.sqrt(x * x + z * z), 1e-6)
    edge = 1e-4 * solid.height
    cap = (y < edge) * np.float32(-1) + ((y > solid.height - edge) if not taper else np.float32(0))
    side = cap == 0
    return x * outward * side, np.where(side, np.float32(upward), cap), z * outward * side
