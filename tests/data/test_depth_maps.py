"""Depth readers: every format and unit, and every kind of bad file."""

import contextlib
import io
import math
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from perceptio_hf.data import depth_maps
from perceptio_hf.data.arrays import read_array
from perceptio_hf.data.depth_maps import (
    UNITS,
    DepthMap,
    depth_from_values,
    read_depth,
    relative_from_disparity,
    relative_from_metric,
    write_depth_png,
)

RGBD = Path(__file__).resolve().parents[2].parent / "shared" / "rgbd"
METRES = np.array([[1.0, 2.0, 4.0], [0.0, 1.5, 3.0]])
VALID = METRES > 0
RELATIVE = np.where(VALID, (1 / np.where(VALID, METRES, 1) - 1 / 4) / (1 - 1 / 4), 0)


def save_png(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values).save(path)
    return path


def test_relative_depth_is_scaled_inverse_distance():
    np.testing.assert_allclose(relative_from_metric(METRES), RELATIVE, atol=1e-7)
    assert relative_from_metric(METRES).dtype == np.float32
    np.testing.assert_allclose(relative_from_metric(METRES * 1000), RELATIVE, atol=1e-7)
    with_more_holes = relative_from_metric(METRES, METRES != 1.0)
    assert with_more_holes[0, 0] == 0 and with_more_holes[1, 1] == 1


@pytest.mark.parametrize("hole", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_holes_of_distances(hole):
    depth = METRES.copy()
    depth[1, 0] = hole
    item = DepthMap.from_metric(depth)
    np.testing.assert_array_equal(item.valid, VALID)
    np.testing.assert_allclose(item.relative, RELATIVE, atol=1e-7)
    np.testing.assert_array_equal(item.metric, METRES.astype(np.float32))


def test_disparity_may_be_any_affine_function_of_inverse_depth():
    disparity = -3.0 + 7.0 * RELATIVE
    np.testing.assert_allclose(relative_from_disparity(disparity), RELATIVE, atol=1e-6)
    disparity[1, 1] = math.nan
    assert relative_from_disparity(disparity)[1, 1] == 0


def test_millimetres_in_a_16_bit_picture(tmp_path):
    values = (METRES * 1000).astype(np.uint16)
    item = read_depth(save_png(tmp_path / "d.png", values), "mm")
    np.testing.assert_allclose(item.metric, METRES, atol=1e-6)
    np.testing.assert_array_equal(item.valid, VALID)
    np.testing.assert_allclose(item.relative, RELATIVE, atol=1e-6)
    assert (item.relative.dtype, item.valid.dtype, item.metric.dtype) == (np.float32, bool, np.float32)


def test_a_saturated_integer_distance_is_a_hole(tmp_path):
    values = (METRES * 1000).astype(np.uint16)
    values[1, 0] = 65535
    np.testing.assert_array_equal(read_depth(save_png(tmp_path / "d.png", values), "mm").valid, VALID)


@pytest.mark.parametrize("suffix", ["npy", "npz", "named.npz"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_metres_in_arrays(tmp_path, suffix, dtype):
    path, values = tmp_path / f"d.{suffix}", METRES.astype(dtype)
    if suffix == "npy":
        np.save(path, values)
    elif suffix == "npz":
        np.savez_compressed(path, anything=values)
    else:
        np.savez(path, depth=values, other=np.zeros(3))
    item = read_depth(path, "m")
    np.testing.assert_allclose(item.metric, METRES, atol=1e-6)
    np.testing.assert_allclose(item.relative, RELATIVE, atol=1e-6)


@pytest.mark.parametrize(("dtype", "full"), [(np.uint8, 255), (np.uint16, 65535)])
def test_relative_depth_in_integer_pictures(tmp_path, dtype, full):
    values = np.round(np.linspace(0, full, 12).reshape(3, 4)).astype(dtype)
    for path in (save_png(tmp_path / "d.png", values), tmp_path / "d.npy"):
        np.save(tmp_path / "d.npy", values)
        item = read_depth(path, "relative")
        np.testing.assert_allclose(item.relative, values / full, atol=1e-6)
        assert item.valid.all() and item.metric is None


def test_singleton_channels_are_dropped(tmp_path):
    for shape in ((1, 2, 3), (2, 3, 1)):
        np.save(tmp_path / "d.npy", METRES.reshape(shape))
        np.testing.assert_allclose(read_depth(tmp_path / "d.npy", "m").metric, METRES)


def test_written_depth_is_read_back(tmp_path):
    relative = np.random.default_rng(0).random((9, 7)).astype(np.float32)
    valid = relative > 0.1
    write_depth_png(tmp_path / "d.png", relative, valid)
    with Image.open(tmp_path / "d.png") as picture:
        assert picture.mode.startswith("I") and picture.size == (7, 9)
    back = read_depth(tmp_path / "d.png", "relative").relative
    np.testing.assert_allclose(back, np.where(valid, relative, 0), atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["d.png"]
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        write_depth_png(tmp_path / "d.png", relative * 2)
    np.testing.assert_array_equal(read_depth(tmp_path / "d.png", "relative").relative, back)


@pytest.mark.parametrize("values", [np.zeros((3, 3)), np.full((3, 3), math.nan), np.full((3, 3), 2.5)])
@pytest.mark.parametrize("unit", ["mm", "m", "disparity", "relative"])
def test_empty_and_constant_maps_are_refused(tmp_path, values, unit):
    np.save(tmp_path / "d.npy", values)
    with pytest.raises(ValueError, match=r"d\.npy: .*(no pixel holds a valid depth|same depth)"):
        read_depth(tmp_path / "d.npy", unit)


def test_relative_values_outside_the_unit_interval_are_refused(tmp_path):
    np.save(tmp_path / "d.npy", METRES)
    with pytest.raises(ValueError, match="give their unit"):
        read_depth(tmp_path / "d.npy", "relative")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "1"])
def test_colour_pictures_are_refused(tmp_path, mode):
    Image.new("RGB", (4, 4), (255, 102, 51)).convert(mode).save(tmp_path / "d.png")
    with pytest.raises(ValueError, match=f"mode {mode}"):
        read_depth(tmp_path / "d.png", "mm")


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pictures_are_refused(tmp_path, mode):
    grey = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).convert(mode)
    grey.putalpha(Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)))
    grey.save(tmp_path / "d.png")
    with pytest.raises(ValueError, match=f"mode {mode}"):
        read_depth(tmp_path / "d.png", "relative")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA"])
def test_three_equal_channels_are_grey(tmp_path, mode):
    """What Depth Anything V2's own script writes with --grayscale, and what shrinks such files."""
    grey = np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(grey).convert(mode).save(tmp_path / "d.png")
    item = read_depth(tmp_path / "d.png", "relative")
    np.testing.assert_allclose(item.relative, grey / 255, atol=1e-6)
    assert item.valid.all()
    np.save(tmp_path / "d.npy", np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(read_depth(tmp_path / "d.npy", "relative").relative, item.relative)


@pytest.mark.parametrize("channels", [2, 3, 4])  # grey with alpha, RGB, RGBA
def test_deep_colour_is_refused_instead_of_shortened_to_8_bits(tmp_path, channels):
    row = b"\0" + b"\x12\x34" * channels * 4
    kind = {2: 4, 3: 2, 4: 6}[channels]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 4, 3, 16, kind, 0, 0, 0)), (b"IDAT", zlib.compress(row * 3))]
    data = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in [*chunks, (b"IEND", b"")]
    )
    (tmp_path / "d.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    with pytest.raises(ValueError, match="three equal ones of 8 bits"):
        read_depth(tmp_path / "d.png", "mm")


@pytest.mark.parametrize("suffix", [".tif", ".tiff"])
def test_tiff(tmp_path, suffix):
    path = tmp_path / f"d{suffix}"
    kitti = (METRES * 256).astype(np.uint16)
    for values, unit in ((METRES.astype(np.float32), "m"), ((METRES * 1000).astype(np.uint16), "mm"), (kitti, "m/256")):
        for options in ({}, {"compression": "tiff_lzw"}):
            Image.fromarray(values).save(path, **options)
            item = read_depth(path, unit)
            np.testing.assert_allclose(item.metric, METRES, atol=1e-6)
            np.testing.assert_array_equal(item.valid, VALID)
    far = np.array([[70_000, 90_000], [0, 100_000]], np.int32)  # millimetres beyond 16 bits
    Image.fromarray(far).save(path)
    np.testing.assert_allclose(read_depth(path, "mm").metric, far / 1000)
    np.testing.assert_allclose(depth_from_values(Image.open(path), "mm").metric, far / 1000)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32])
def test_disparity_as_whole_numbers_keeps_its_holes(tmp_path, dtype):
    """KITTI and Middlebury write 0 where nothing matched, OpenCV's matcher something negative."""
    disparity = np.array([[100, 50, 25], [0, 66, 33]], dtype)
    np.save(tmp_path / "d.npy", disparity)
    item = read_depth(tmp_path / "d.npy", "disparity")
    np.testing.assert_array_equal(item.valid, disparity > 0)
    assert item.relative[0, 2] == 0 and item.relative[1, 0] == 0
    if dtype in (np.uint8, np.uint16):
        np.testing.assert_array_equal(
            read_depth(save_png(tmp_path / "d.png", disparity), "disparity").valid, item.valid
        )
    else:
        item = depth_from_values(np.where(disparity == 0, dtype(-16), disparity), "disparity")
        np.testing.assert_array_equal(item.valid, disparity > 0)
    full = np.where(disparity == 0, np.iinfo(dtype).max, disparity)
    np.testing.assert_array_equal(depth_from_values(full, "disparity").valid, disparity > 0)
    assert depth_from_values(disparity.astype(np.float32), "disparity").valid.all()  # any affine function of 1/z


@settings(deadline=None, max_examples=200)
@given(
    st.one_of(
        *(
            arrays(dtype, array_shapes(min_dims=2, max_dims=2, max_side=4))
            for dtype in ("f2", "f4", "f8", "u1", "u2", "i2", "i4", "u4", "i8", "u8", ">f4")
        )
    ),
    st.sampled_from(UNITS),
)
@example(np.array([[1e308, -1e308, 1.0]]), "disparity")
@example(np.array([[1e300, 1.0, 2.0]]), "m")
@example(np.array([[1e-320, 1.0, 2.0]]), "m")
def test_whatever_numbers_come_what_counts_as_measured_is_finite(values, unit):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            item = depth_from_values(values, unit)
        except ValueError:
            return
    assert np.isfinite(item.relative).all() and item.relative.min() >= 0 and item.relative.max() <= 1
    assert item.valid.any() and not item.relative[~item.valid].any()
    if item.metric is not None:
        assert np.isfinite(item.metric).all() and ((item.metric > 0) == item.valid).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones(5), "shape"),
        (np.ones((2, 3, 4)), "shape"),
        (np.ones((0, 4)), "shape"),
        (np.ones((2, 2), complex), "complex"),
        (np.ones((2, 2), bool), "bool"),
        (np.array([["a", "b"]]), "<U1"),
        (np.array([[{}, 1]], dtype=object), "d.npy"),
    ],
)
def test_arrays_that_are_no_depth_map_are_refused(tmp_path, values, message):
    np.save(tmp_path / "d.npy", values, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        read_depth(tmp_path / "d.npy", "m")


def test_an_archive_without_a_clear_array_is_refused(tmp_path):
    np.savez(tmp_path / "d.npz", left=METRES, right=METRES)
    with pytest.raises(ValueError, match=r"left.*right"):
        read_depth(tmp_path / "d.npz", "m")
    np.savez(tmp_path / "e.npz", depth=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"e\.npz"):
        read_depth(tmp_path / "e.npz", "m")


@pytest.mark.parametrize("suffix", [".png", ".npy", ".npz"])
@pytest.mark.parametrize("keep", [0, 20, -60])
def test_damaged_files_are_refused(tmp_path, suffix, keep):
    path = tmp_path / f"d{suffix}"
    if suffix == ".png":
        save_png(path, np.random.default_rng(0).integers(0, 9999, (40, 40)).astype(np.uint16))
    else:
        (np.save if suffix == ".npy" else np.savez)(path, METRES)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"d\."):
        read_depth(path, "m")


def array_file(suffix: str) -> bytes:
    file = io.BytesIO()
    {".npy": np.save, ".npz": np.savez, ".packed": np.savez_compressed}[suffix](file, METRES)
    return file.getvalue()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".packed"])
def test_no_damage_gives_anything_but_one_error(suffix):
    """Every byte of the file changed in eight ways, and every length."""
    good = array_file(suffix)
    assert np.array_equal(read_array(good), METRES)
    rng = np.random.default_rng(0)
    damaged = [good[:length] for length in range(len(good))]
    for place in range(len(good)):
        for changed in (0, 255, good[place] ^ 1, *rng.integers(0, 256, 5).tolist()):
            damaged.append(good[:place] + bytes([changed]) + good[place + 1 :])
    for data in damaged:
        with contextlib.suppress(ValueError):
            assert read_array(data).dtype.kind in "biuf"


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((10**6, 10**6), "<f8"), ((2**62, 4), "<f8"), ((-1, -6), "<f8"), ((2, 3), "<f4"), ((2, 3), "(10000,10000)<f8")],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_what_a_header_claims_is_compared_before_it_is_allocated(tmp_path, shape, dtype, suffix):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + METRES.tobytes()
    path = tmp_path / f"d{suffix}"
    if suffix == ".npy":
        path.write_bytes(data)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("depth.npy", data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"d\.np.: (claims|is cut off|holds)"):
        read_depth(path, "m")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_archives_that_numpy_does_not_write_are_refused(tmp_path):
    for name, method in (("bz2", zipfile.ZIP_BZIP2), ("lzma", zipfile.ZIP_LZMA)):
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w", method) as archive:
            archive.writestr("depth.npy", array_file(".npy"))
        with pytest.raises(ValueError, match="as numpy packs nothing"):
            read_depth(tmp_path / f"{name}.npz", "m")


def test_files_of_other_kinds_are_refused(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "d.jpg")
    Image.new("L", (4, 4)).save(tmp_path / "jpeg.png", format="JPEG")
    for name, message in (("d.jpg", "expected .png"), ("none.png", "no depth map"), ("jpeg.png", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            read_depth(tmp_path / name, "mm")
    with pytest.raises(ValueError, match="Unknown depth unit 'km'"):
        read_depth(tmp_path / "d.jpg", "km")


@pytest.mark.parametrize("suffix", [".png", ".npy", ".npz"])
def test_huge_files_are_refused(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(depth_maps, "MAX_PIXELS", 5)
    path = tmp_path / f"d{suffix}"
    if suffix == ".png":
        save_png(path, METRES.astype(np.uint8))
    else:
        (np.save if suffix == ".npy" else np.savez)(path, METRES)
    with pytest.raises(ValueError, match="pixels"):
        read_depth(path, "m")


@pytest.mark.skipif(not RGBD.is_dir(), reason="the frames of the real room are not here")
def test_a_real_room():
    items = [read_depth(path, "mm") for path in sorted(RGBD.glob("*.depth.png"))]
    assert len(items) == 50
    for item in items:
        assert item.relative.shape == (480, 640) and 0.5 < item.valid.mean() < 1.0
        assert item.metric[item.valid].min() > 0.3 and item.metric.max() < 20.0
        assert item.relative.min() == 0.0 and item.relative.max() == 1.0
        nearest = np.argmax(item.relative)
        assert item.metric.flat[nearest] == item.metric[item.valid].min()
