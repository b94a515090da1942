"""Masks in the forms people have them: read right, or refused."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from pycocotools import mask as coco

from perceptio_hf.data.encoded import load_mask
from perceptio_hf.data.masks import draw_polygons
from perceptio_hf.data.run_length import encode_mask

SIZE = (40, 48)


def ball() -> np.ndarray:
    rows, columns = np.mgrid[:40, :48]
    return (rows - 18) ** 2 + (columns - 25) ** 2 < 130


def stored(picture: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, **options)
    return file.getvalue()


def grey(mask: np.ndarray, inside: int = 255) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * np.uint8(inside))


def coco_drawn(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    return coco.decode(coco.merge(coco.frPyObjects(polygons, height, width))).astype(bool)


corners = st.one_of(st.floats(-5, 70), st.integers(-10, 140).map(lambda number: number / 2))
outlines = st.lists(corners, min_size=6, max_size=16).map(lambda numbers: numbers[: len(numbers) // 2 * 2])


@settings(deadline=None, max_examples=300)
@given(st.lists(outlines, min_size=1, max_size=3), st.integers(7, 60), st.integers(7, 60))
def test_polygons_are_drawn_as_pycocotools_draws_them(polygons, height, width):
    expected = coco_drawn(polygons, height, width)
    if not expected.any():
        with pytest.raises(ValueError, match="no pixel"):
            draw_polygons(polygons, height, width)
    else:
        assert np.array_equal(draw_polygons(polygons, height, width), expected)


@pytest.mark.parametrize(
    ("polygons", "words"),
    [
        ([[1, 2, 3, 4, 5, 6, 7]], "has 7 numbers"),
        ([[1, 1, 1e9, 1, 1, 9]], "far outside"),
        ([[1, 1, float("nan"), 1, 1, 9]], "far outside"),
        ([[100, 100, 120, 100, 120, 120]], "no pixel"),
        ([[1, 1, 9, 9]], "no pixel"),  # a line; one of COCO's own objects is of this kind
    ],
)
def test_polygons_that_are_none(polygons, words):
    with pytest.raises(ValueError, match=words):
        load_mask(polygons, SIZE)


def test_rows_of_numbers_are_told_from_polygons():
    square = [10.0, 5.0, 30.0, 5.0, 30.0, 20.0, 10.0, 20.0]
    expected = coco_drawn([square], *SIZE)
    for form in ([square], square, {"polygons": [square]}, [[int(number) for number in square]]):
        assert np.array_equal(load_mask(form, SIZE), expected)
    two = [square, [1, 1, 8, 1, 8, 4, 1, 4]]
    assert np.array_equal(load_mask(two, SIZE), coco_drawn(two, *SIZE))
    labels = ball() * 7 + (np.mgrid[:40, :48][0] > 35) * 2
    for plane in (ball().tolist(), labels.tolist(), (ball() * 1.0).tolist(), (ball() * 255).tolist()):
        assert np.array_equal(load_mask(plane, SIZE), np.asarray(plane) != 0)
    # Of another size they are reported as what they are, not drawn.
    assert load_mask(ball()[:20].tolist(), SIZE).shape == (20, 48)
    assert load_mask((ball()[:20] * 255).tolist(), SIZE).shape == (20, 48)
    assert load_mask([[0.1, 0.2, 0.9, 0.2, 0.9, 0.8]], SIZE).shape == (1, 6)  # shares of the sides, as YOLO has them


@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_masks_are_right_or_refused(quality, mode):
    box = np.zeros(SIZE, bool)
    box[5:21, 10:33] = True
    for mask in (ball(), box, ~box, np.random.default_rng(0).random(SIZE) > 0.5):
        data = stored(grey(mask).convert(mode), format="JPEG", quality=quality)
        try:
            assert np.array_equal(load_mask(data), mask)
        except ValueError as error:
            assert "stored with loss" in str(error)
    with pytest.raises(ValueError, match="stored with loss"):
        load_mask(stored(grey(ball(), inside=1), format="JPEG", quality=quality))
    clean = stored(grey(box).convert(mode), format="JPEG", quality=95)
    assert np.array_equal(load_mask(clean), box)


def test_transparent_masks():
    mask = ball()
    alpha, black, white = grey(mask), grey(~mask & mask), grey(mask | ~mask)
    photo = Image.fromarray(np.random.default_rng(0).integers(1, 256, (*SIZE, 3), dtype=np.uint8))
    opaque = grey(mask).convert("RGBA")
    half = opaque.copy()
    half.putalpha(128)
    shown = [(black, "RGBA"), (white, "RGBA"), (white, "LA"), (photo, "RGBA")]
    pictures = [opaque, half]
    for picture, mode in shown:  # the picture shows through where the mask is
        picture = picture.convert(mode)
        picture.putalpha(alpha)
        pictures.append(picture)
    for picture in pictures:
        assert np.array_equal(load_mask(picture), mask)
        assert np.array_equal(load_mask(stored(picture, format="PNG")), mask)
    both = grey(np.mgrid[:40, :48][1] > 20).convert("RGBA")
    both.putalpha(alpha)
    nothing = white.convert("RGBA")
    nothing.putalpha(0)
    for picture, words in ((both, "both its colours and its transparency"), (nothing, "transparent everywhere")):
        with pytest.raises(ValueError, match=words):
            load_mask(picture)


def test_colour_and_palette():
    mask = ball()
    blue = np.zeros((*SIZE, 3), np.uint8)
    blue[mask] = 0, 0, 3  # black, by the grey value that Pillow gives it
    assert np.array_equal(load_mask(Image.fromarray(blue)), mask)
    palette = grey(mask, inside=15).convert("P")
    palette.putpalette([0, 0, 0] + [200, 30, 40] * 255)
    assert np.array_equal(load_mask(palette), mask)
    palette.putpalette([255, 255, 255] + [0, 0, 0] * 255)  # label 0 is white
    with pytest.raises(ValueError, match="label 0 as black"):
        load_mask(palette)


def test_grey_steps_are_refused_and_labels_taken():
    mask = ball()
    smooth = Image.new("L", (480, 400))
    ImageDraw.Draw(smooth).ellipse((100, 60, 400, 300), fill=255)
    smooth = smooth.resize((48, 40), Image.Resampling.BILINEAR)
    void = mask * 7
    void[:3] = 255
    many = np.arange(40 * 48).reshape(SIZE) % 200
    for picture in (smooth, np.asarray(smooth), void.astype(np.uint8), many.astype(np.uint8), many):
        with pytest.raises(ValueError, match="grey steps"):
            load_mask(picture)
    labels = (mask * 3 + (np.mgrid[:40, :48][0] > 35) * 2).astype(np.uint8)
    for form in (labels, labels.astype(np.int64), labels.astype(np.uint16) * 900, Image.fromarray(labels)):
        assert np.array_equal(load_mask(form), labels != 0)
    for trimap in (mask + 1, np.where(mask, 1, -1)):
        with pytest.raises(ValueError, match="without any 0"):
            load_mask(trimap)


def test_probabilities_are_inside_from_a_half_on(tmp_path):
    shares = np.clip(1.2 - np.hypot(*(np.mgrid[:40, :48] - 20)) / 15, 0, 1).astype(np.float32)
    np.save(tmp_path / "m.npy", shares)
    np.savez(tmp_path / "m.npz", shares)
    Image.fromarray(shares).save(tmp_path / "m.tif")
    for form in (
        shares,
        Image.fromarray(shares),
        shares.tolist(),
        *(str(tmp_path / f"m.{end}") for end in ("npy", "npz", "tif")),
    ):
        assert np.array_equal(load_mask(form, SIZE), shares >= 0.5)
    for wrong, words in (
        (shares - 0.5, "negative"),
        (shares * 9, "nor two-valued"),
        (shares / 4, "highest value is 0.25"),
    ):
        with pytest.raises(ValueError, match=words):
            load_mask(wrong)
    shares[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        load_mask(shares)
    for two in (ball() * 1.0, ball() * 255.0, np.zeros(SIZE), np.ones(SIZE)):
        assert np.array_equal(load_mask(two), two > 0)


def test_arrays_in_files(tmp_path):
    for mask in (ball(), ball().astype(np.uint8), ball()[..., None]):
        np.save(tmp_path / "m.npy", mask)
        np.savez_compressed(tmp_path / "m.npz", mask)
        for form in (tmp_path / "m.npy", str(tmp_path / "m.npz"), (tmp_path / "m.npy").read_bytes()):
            assert np.array_equal(load_mask(form), ball())
    (tmp_path / "m.npy").write_bytes((tmp_path / "m.npy").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"m\.npy: is cut off"):
        load_mask(tmp_path / "m.npy")


def test_claims_of_run_lengths_are_not_believed():
    for lengths in ({"size": [10**6, 10**6], "counts": [10**12]}, {"size": [4, 4], "counts": [2**62] * 4 + [16]}):
        with pytest.raises(ValueError, match=r"more than|cover"):
            load_mask(lengths)
    assert np.array_equal(load_mask(dict(encode_mask(ball()), bytes=None, path=None, polygons=None)), ball())
