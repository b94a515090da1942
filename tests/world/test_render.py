"""The renderer: same seed same bytes, exact depth, masks that fit, every size."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from perceptio_hf.world import Scene, render_scene
from perceptio_hf.world.layout import make_layout
from perceptio_hf.world.scene import ATTRIBUTES

SEEDS = range(40)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render_scene(seed) for seed in SEEDS]


def digest(scene: Scene) -> str:
    parts = (scene.image, scene.depth, scene.instances, scene.surfaces)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts) + repr(scene.objects).encode()).hexdigest()


def outside(solid, x, y, z):
    """Positive outside of a solid, zero on its surface, negative within; written from the definitions of the shapes."""
    x, y, z = x - solid.x, y - solid.y, z - solid.z
    if solid.shape == "ball":
        return np.sqrt(x**2 + (y - solid.rx) ** 2 + z**2) - solid.rx
    heights = np.maximum(-y, y - solid.height)
    if solid.shape == "box":
        across = np.array([np.cos(solid.yaw), np.sin(solid.yaw)])
        a, b = x * across[0] + z * across[1], -x * across[1] + z * across[0]
        return np.maximum(heights, np.maximum(np.abs(a) - solid.rx, np.abs(b) - solid.rz))
    radius = solid.rx * (1 - y / solid.height) if solid.shape == "cone" else solid.rx
    return np.maximum(heights, np.sqrt(x**2 + z**2) - radius)


def ray(layout, size, column, row):
    """Origin and direction in float64 of the ray through a pixel's centre; the direction has depth 1."""
    camera = layout.camera
    u, v = (((c + 0.5) / size * 2 - 1) * camera.tan_half for c in (column, row))
    u, v = (
        u * np.cos(camera.roll) - v * np.sin(camera.roll),
        u * np.sin(camera.roll) + v * np.cos(camera.roll),
    )
    up, ahead = -v * np.cos(camera.pitch) - np.sin(camera.pitch), np.cos(camera.pitch) - v * np.sin(camera.pitch)
    # A roll turns right towards down, so along the picture's right the world's up falls.
    return np.array([0, camera.height, 0]), np.array([u, up, ahead])


def test_same_seed_gives_same_bytes():
    assert digest(render_scene(3)) == digest(render_scene(3))
    assert len({digest(render_scene(seed, 32)) for seed in range(30)}) == 30


def test_another_process_gives_the_same_bytes():
    code = "import sys; sys.path[:0] = sys.argv[1:]; import test_render as t; print(t.digest(t.render_scene(11)))"
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", code, here, *[p for p in sys.path if p]]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert found == digest(render_scene(11))


def test_arrays_are_as_documented(scenes):
    for scene in scenes:
        assert scene.image.dtype == np.uint8 and scene.image.shape == (128, 128, 3)
        assert scene.depth.dtype == np.float32 and scene.depth.shape == (128, 128)
        assert scene.instances.dtype == scene.surfaces.dtype == np.uint8
        assert np.isfinite(scene.depth).all()
        assert scene.depth.min() > 0.8 and scene.depth.max() < 9.2
        assert 2 <= len(scene.objects) <= 6
        assert scene.image.std() > 8


def test_objects_describe_their_masks(scenes):
    for scene in scenes:
        assert scene.instances.max() == len(scene.objects)
        for number, thing in enumerate(scene.objects, 1):
            mask = scene.mask(number)
            rows, columns = np.nonzero(mask)
            assert thing.pixels == mask.sum() >= 30
            assert thing.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert mask[thing.center[1], thing.center[0]]
            assert thing.depth == pytest.approx(np.median(scene.depth[mask]), rel=0.02)
            assert all(getattr(thing, name) in values for name, values in ATTRIBUTES.items())


@pytest.mark.parametrize("seed", range(0, 40, 3))
def test_depth_is_where_the_ray_meets_the_scene(scenes, seed):
    """Pixel by pixel in float64: the point at this depth lies on what is seen, and nothing stands before it."""
    scene, layout = scenes[seed], make_layout(seed)
    r = np.random.default_rng(seed)
    pixels = [thing.center for thing in scene.objects] + [tuple(p) for p in r.integers(0, 128, (12, 2))]
    solids = [thing.solid for thing in layout.things] + ([layout.platform] if layout.platform else [])
    for column, row in pixels:
        origin, direction = ray(layout, 128, column, row)
        depth, number = float(scene.depth[row, column]), scene.instances[row, column]
        point = origin + depth * direction
        gaps = [plane.offset - np.dot(plane.normal, point) for plane in layout.planes]
        distances = [outside(solid, *point) for solid in solids]
        assert min(gaps) > -1e-3 and min(distances) > -1e-3
        if number:
            assert abs(distances[number - 1]) < 1e-3
        else:
            assert min(*gaps, *distances) < 1e-3
        along = origin[:, None] + direction[:, None] * np.linspace(0, depth * 0.999, 500)
        assert min(outside(solid, *along).min() for solid in solids) > -2e-3


def test_masks_agree_with_depth_everywhere(scenes):
    for seed, scene in zip(SEEDS, scenes, strict=True):
        layout = make_layout(seed)
        for number, thing in enumerate(layout.things, 1):
            rows, columns = np.nonzero(scene.mask(number))
            origin, direction = ray(layout, 128, columns, rows)
            points = origin[:, None] + scene.depth[rows, columns] * direction
            assert np.abs(outside(thing.solid, *points)).max() < 2e-3


def test_objects_do_not_run_into_each_other():
    for seed in range(60):
        layout = make_layout(seed)
        r = np.random.default_rng(seed)
        for thing in layout.things:
            solid = thing.solid
            inside = np.array(solid.middle)[:, None] + r.uniform(-solid.bound, solid.bound, (3, 400))
            inside = inside[:, outside(solid, *inside) < -1e-3]
            others = [t.solid for t in layout.things if t is not thing]
            others += [layout.platform] if layout.platform else []
            assert all((outside(other, *inside) > 0).all() for other in others)


@pytest.mark.parametrize("size", [32, 64, 97, 160, 256, 448])
def test_other_sizes_show_the_same_scene(scenes, size):
    scene, other = scenes[5], render_scene(5, size)
    assert other.image.shape == (size, size, 3) and other.size == size
    assert [(o.shape, o.color, o.size, o.material) for o in other.objects] == [
        (o.shape, o.color, o.size, o.material) for o in scene.objects
    ]
    for a, b in zip(scene.objects, other.objects, strict=True):
        assert b.depth == pytest.approx(a.depth, rel=0.05)
        assert b.pixels * (128 / size) ** 2 == pytest.approx(a.pixels, rel=0.35)


def test_wrong_arguments_are_explained(scenes):
    with pytest.raises(ValueError, match="at least 32"):
        render_scene(0, 16)
    with pytest.raises(ValueError, match="seed"):
        render_scene(-1)
    with pytest.raises(ValueError, match="no object 9"):
        scenes[0].mask(9)
