"""From a layout to a picture with exact depth and masks. No loop runs over pixels: only over surfaces and objects."""

from functools import lru_cache

import numpy as np

from .geometry import Camera, Solid, Vector, dot, enter, normals, window
from .layout import make_layout
from .parts import Layout, Light, Plane, Texture, Thing
from .scene import MIN_SIZE, Scene, SceneObject

_PLATFORM = 4  # its index in SURFACES
_NOISE_STARTS = 1 << 16
_SHADOW_SLACK = 0.02  # metres around a bounding cylinder in which exact shadow tests are still made


def render_scene(seed: int, size: int = 128) -> Scene:
    """Draw the scene number `seed` (0 or more) as a picture of `size` x `size` pixels.

    The same seed and size give the same bytes; another size shows the same scene at another resolution.
    """
    if seed < 0 or size < MIN_SIZE:
        raise ValueError(
            f"seed={seed}, size={size}: the seed must be 0 or more and the size at least {MIN_SIZE} pixels"
        )
    layout = make_layout(int(seed))
    depth, instances, surfaces, directions = _trace(layout, size)
    image = _shade(layout, depth, instances, surfaces, directions, np.random.default_rng((int(seed), 1)))
    return Scene(int(seed), image, depth, instances, surfaces, _describe(layout, depth, instances))


def _trace(layout: Layout, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Vector]:
    """Depth, instances, surfaces and the camera rays' directions, all (size, size)."""
    camera = layout.camera
    directions = camera.directions(size)
    depth, surfaces = _trace_room(layout.planes, camera, size)
    instances = np.zeros((size, size), np.uint8)
    if layout.platform is not None:
        where, nearer = _trace_solid(layout.platform, camera, directions, depth)
        surfaces[where][nearer] = _PLATFORM
    for number, thing in enumerate(layout.things, 1):
        where, nearer = _trace_solid(thing.solid, camera, directions, depth)
        instances[where][nearer] = number
    return depth, instances, surfaces, directions


def _trace_room(planes: tuple[Plane, ...], camera: Camera, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The room is convex and the camera inside, so the nearest plane is the one of largest inverse depth."""
    best, surfaces = None, np.zeros((size, size), np.uint8)
    for plane in planes:
        distance = plane.offset - dot(plane.normal, camera.origin)
        inverse = camera.linear(size, tuple(n / distance for n in plane.normal))
        if best is None:
            best = inverse
        else:
            surfaces[inverse > best] = plane.surface
            np.maximum(best, inverse, out=best)
    return 1 / best, surfaces


def _trace_solid(
    solid: Solid, camera: Camera, directions: Vector, depth: np.ndarray
) -> tuple[tuple[slice, slice], np.ndarray]:
    """Draw a solid into `depth`; returns the window it was looked for in and where in it the solid is the nearest."""
    where = window(solid, camera, depth.shape[0])
    t = enter(solid, camera.origin, tuple(d[where] for d in directions))
    nearer = t < depth[where]
    depth[where][nearer] = t[nearer]
    return where, nearer


def _describe(layout: Layout, depth: np.ndarray, instances: np.ndarray) -> list[SceneObject]:
    size = depth.shape[0]
    objects = []
    for number, thing in enumerate(layout.things, 1):
        rows, columns = window(thing.solid, layout.camera, size)
        y, x = np.nonzero(instances[rows, columns] == number)
        y, x = y + rows.start, x + columns.start
        middle = np.argmin((x - x.mean()) ** 2 + (y - y.mean()) ** 2)
        distances = np.sort(depth[y, x])
        objects.append(
            SceneObject(
                thing.shape,
                thing.color,
                thing.size,
                thing.material,
                pixels=len(x),
                depth=float(distances[len(x) // 2]),
                box=(int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1),
                center=(int(x[middle]), int(y[middle])),
            )
        )
    return objects


def _shade(
    layout: Layout,
    depth: np.ndarray,
    instances: np.ndarray,
    surfaces: np.ndarray,
    directions: Vector,
    rng: np.random.Generator,
) -> np.ndarray:
    """uint8 (size, size, 3): the colours."""
    size = depth.shape[0]
    points = tuple(o + depth * d for o, d in zip(layout.camera.origin, directions, strict=True))
    lit = _light(layout, points, instances)
    linear = np.empty((3, size * size), np.float32)
    flat = tuple(p.ravel() for p in points)
    kinds = np.where(instances == 0, surfaces, np.uint8(255)).ravel()
    occlusion = _occlusion(layout, points).ravel()
    for plane in layout.planes:
        index = np.flatnonzero(kinds == plane.surface)
        if index.size:
            linear[:, index] = _shade_plane(plane, layout.light, flat, lit.ravel(), occlusion, index)
    if layout.platform is not None:
        index = np.flatnonzero(kinds == _PLATFORM)
        if index.size:
            linear[:, index] = _shade_platform(layout, flat, lit.ravel(), index)
    for number, thing in enumerate(layout.things, 1):
        index = np.flatnonzero(instances.ravel() == number)
        linear[:, index] = _shade_thing(thing, layout, flat, lit.ravel(), index)
    seams = instances * np.uint8(16) + surfaces * np.uint8(2) + (lit < 0.5)
    return _develop(linear.reshape(3, size, size), seams, layout.noise, rng)


def _light(layout: Layout, points: Vector, instances: np.ndarray) -> np.ndarray:
    """float32 (size, size): 1 where the lamp is seen past the objects, 0 in cast shadows."""
    to_light = tuple(np.float32(c) for c in layout.light.direction)
    lit = np.ones(instances.size, np.float32)
    flat = np.stack([p.ravel() for p in points])
    solids = [t.solid for t in layout.things] + ([layout.platform] if layout.platform else [])
    along, squares = np.float32(to_light) @ flat, np.einsum("ij,ij->j", flat, flat)
    middles = np.array([s.middle for s in solids], np.float32)
    dots, owners = middles @ flat, instances.ravel()
    for number, solid in enumerate(solids, 1):
        # Squared distance of the point from the line through the solid's middle towards the light.
        ahead = np.float32(dot(solid.middle, to_light)) - along
        reach = (solid.bound + _SHADOW_SLACK) ** 2 - dot(solid.middle, solid.middle)
        close = squares - 2 * dots[number - 1] - ahead * ahead < reach
        index = np.flatnonzero(close & (ahead > -solid.bound) & (owners != number) & (lit > 0))
        if index.size:
            origin = tuple(f[index] for f in flat)
            lit[index[enter(solid, origin, to_light) < np.inf]] = 0
    return lit.reshape(instances.shape)


def _occlusion(layout: Layout, points: Vector) -> np.ndarray:
    """float32 (size, size): how much ambient light reaches the ground; less right beside objects that stand on it."""
    open_sky = np.ones(points[0].shape, np.float32)
    for thing in layout.things:
        solid = thing.solid
        if solid.y < 0.3:
            rows, columns = window(solid, layout.camera, open_sky.shape[0])
            extra = (rows.stop - rows.start) // 4
            where = (
                slice(max(rows.start - extra, 0), rows.stop + extra),
                slice(max(columns.start - extra, 0), columns.stop + extra),
            )
            x, z = points[0][where] - solid.x, points[2][where] - solid.z
            open_sky[where] *= 1 - 0.55 * np.exp((x * x + z * z) * np.float32(-0.8 / solid.rx**2) - 6 * solid.y)
    return open_sky


def _shade_plane(
    plane: Plane, light: Light, flat: Vector, lit: np.ndarray, occlusion: np.ndarray, index: np.ndarray
) -> np.ndarray:
    nx, _, nz = plane.normal
    if plane.surface == 0:
        across, along = flat[0][index], flat[2][index]
    else:
        across, along = flat[0][index] * np.float32(nz) - flat[2][index] * np.float32(nx), flat[1][index]
    # A wall that faces away from the lamp still gets some light back from the room.
    facing = max(-dot(plane.normal, light.direction), 0.25)
    direct = lit[index] * np.float32(facing)
    around = occlusion[index] if plane.surface == 0 else np.float32(0.9)
    albedo = _paint(plane.texture, across, along)
    return albedo * _sum_light(light, direct, around)


def _sum_light(light: Light, direct: np.ndarray, around: np.ndarray | np.float32) -> np.ndarray:
    """float32 (3, n): light of the lamp and from all around."""
    color, ambient = np.float32(light.color)[:, None], np.float32(light.ambient)[:, None]
    return color * direct + ambient * around


def _paint(texture: Texture, across: np.ndarray, along: np.ndarray) -> np.ndarray:
    """float32 (3, n): the albedo at places given in metres on a surface."""
    grain = _grain()[
        (across * np.float32(70) + texture.shift[0]).astype(np.int32) & 255,
        (along * np.float32(70) + texture.shift[1]).astype(np.int32) & 255,
    ]
    share = _pattern(texture, across, along, grain)
    first, second = np.float32(texture.first)[:, None], np.float32(texture.second)[:, None]
    tone = 1 + np.float32(texture.mottle) * grain
    return first * tone if share is None else (first + (second - first) * share) * tone


def _pattern(texture: Texture, across: np.ndarray, along: np.ndarray, grain: np.ndarray) -> np.ndarray | None:
    """Share of the second colour, 0 to 1, or None for a plain surface."""
    if texture.kind == "plain":
        return None
    c, s = np.float32(np.cos(texture.angle) / texture.scale), np.float32(np.sin(texture.angle) / texture.scale)
    a, b = across * c + along * s, along * c - across * s
    if texture.kind == "checker":
        return (np.floor(a) + np.floor(b)) % 2
    if texture.kind == "stripes":
        return (np.floor(a * 1.5) % 2).astype(np.float32)
    if texture.kind == "tiles":
        return ((a - np.floor(a) < 0.07) | (b - np.floor(b) < 0.07)).astype(np.float32)
    return 0.5 + 0.5 * np.sin(a * np.float32(9) + grain * np.float32(2.5))


@lru_cache(maxsize=1)
def _grain() -> np.ndarray:
    """float32 (256, 256) in about [-1, 1]: smooth random mottling that repeats without a seam."""
    rng = np.random.default_rng(256)
    total = np.zeros((256, 256), np.float32)
    for cells, weight in ((8, 0.4), (32, 0.4), (128, 0.45)):
        coarse = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
        place = np.arange(256) * cells / 256
        low, share = place.astype(int), (place % 1).astype(np.float32)
        rows = coarse[low] * (1 - share)[:, None] + coarse[(low + 1) % cells] * share[:, None]
        total += weight * (rows[:, low] * (1 - share) + rows[:, (low + 1) % cells] * share)
    return total


def _shade_platform(layout: Layout, flat: Vector, lit: np.ndarray, index: np.ndarray) -> np.ndarray:
    points = tuple(f[index] for f in flat)
    normal = normals(layout.platform, points)
    texture = layout.planes[1].texture
    direct = np.maximum(dot(normal, layout.light.direction), 0.0) * lit[index]
    return (
        np.float32(texture.second)[:, None]
        * 1.2
        * _sum_light(layout.light, direct.astype(np.float32), 0.75 + 0.25 * normal[1])
    )


def _shade_thing(thing: Thing, layout: Layout, flat: Vector, lit: np.ndarray, index: np.ndarray) -> np.ndarray:
    points = tuple(f[index] for f in flat)
    normal = normals(thing.solid, points)
    light, lit = layout.light, lit[index]
    facing = dot(normal, light.direction)
    around = np.float32(0.72) + np.float32(0.28) * normal[1]
    color = np.float32(thing.tint)[:, None] * _sum_light(light, np.maximum(facing, 0) * lit, around)
    return _polish(color, layout, points, normal, lit) if thing.material == "shiny" else color


def _polish(color: np.ndarray, layout: Layout, points: Vector, normal: Vector, lit: np.ndarray) -> np.ndarray:
    """Add what a glossy coat shows: the lamp's highlight and a dim mirror of the room."""
    light = layout.light
    view = tuple(o - p for o, p in zip(layout.camera.origin, points, strict=True))
    inverse = 1 / np.sqrt(dot(view, view))
    view = tuple(v * inverse for v in view)
    cosine = np.maximum(dot(normal, view), 0)
    mirror = tuple(2 * cosine * n - v for n, v in zip(normal, view, strict=True))
    glint = np.maximum(dot(mirror, light.direction), 0) ** 40 * lit
    rim = np.float32(0.08) + np.float32(0.5) * (1 - cosine) ** 4
    floor, wall = (np.float32(layout.planes[k].texture.first)[:, None] for k in (0, 1))
    upward = np.clip(mirror[1] * np.float32(1.5) + np.float32(0.5), 0, 1)
    room = floor * 0.7 + (wall * 1.3 + 0.1 - floor * 0.7) * upward
    return color * (1 - rim) + room * rim + np.float32(light.color)[:, None] * (0.9 * glint)


def _develop(linear: np.ndarray, seams: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth the edges, apply gamma 2, add sensor noise: (3, size, size) float32 to (size, size, 3) uint8."""
    tones = np.sqrt(np.clip(linear, 0, 1, out=linear), out=linear)
    _smooth_seams(tones, seams)
    tones *= np.float32(255)
    tones += _sensor_noise(tones.size, rng).reshape(tones.shape) * np.float32(noise) + np.float32(0.5)
    return np.ascontiguousarray(np.clip(tones, 0, 255, out=tones).astype(np.uint8).transpose(1, 2, 0))


def _sensor_noise(count: int, rng: np.random.Generator) -> np.ndarray:
    """float32 (count,) of unit normal noise: a random stretch of one long fixed sequence, since drawing is slow."""
    start = int(rng.integers(_NOISE_STARTS))
    return _noise_sequence(count + _NOISE_STARTS)[start : start + count]


@lru_cache(maxsize=4)  # one for each size of picture in use
def _noise_sequence(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal(count, dtype=np.float32)


def _smooth_seams(tones: np.ndarray, seams: np.ndarray) -> None:
    """Mix pixels at the border of two surfaces or of a shadow with their four neighbours, in place."""
    edge = np.zeros(seams.shape, bool)
    across, along = seams[:, 1:] != seams[:, :-1], seams[1:] != seams[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= along
    edge[:-1] |= along
    edge[[0, -1]] = False
    edge[:, [0, -1]] = False
    index, width = np.flatnonzero(edge), seams.shape[1]
    flat = tones.reshape(3, -1)
    around = sum(flat[:, index + step] for step in (-1, 1, -width, width))
    flat[:, index] = np.float32(0.4) * flat[:, index] + np.float32(0.15) * around
