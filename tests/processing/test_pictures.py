"""Every kind of picture a user may hand in becomes upright 8-bit RGB, or one clear error."""

import numpy as np
import pytest
from PIL import Image

from perceptio_hf.processing.pictures import MAX_PIXELS, load_picture


@pytest.fixture
def rgb() -> np.ndarray:
    """A picture without any symmetry: (6 high, 9 wide, 3), uint8."""
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def pixels(source, **options) -> np.ndarray:
    picture = load_picture(source, **options)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def message(source, **options) -> str:
    with pytest.raises(ValueError) as caught:
        load_picture(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_path_string_picture_and_array_agree(tmp_path, rgb):
    path = tmp_path / "picture.png"
    Image.fromarray(rgb).save(path)
    for source in (path, str(path), Image.open(path), Image.fromarray(rgb), rgb):
        assert np.array_equal(pixels(source), rgb)


def test_a_picture_handed_in_stays_as_it_was(rgb):
    mine = Image.fromarray(rgb)
    load_picture(mine).putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(np.asarray(mine), rgb)


# EXIF orientation -> what the viewer does with the stored pixels
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
def test_exif_orientation_is_applied(tmp_path, rgb, orientation, kind):
    path = tmp_path / f"picture.{kind}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "webp" else {}
    Image.fromarray(rgb).save(path, exif=exif, **options)
    expected = UPRIGHT[orientation](rgb)
    assert np.array_equal(pixels(path), expected)
    assert np.array_equal(pixels(load_picture(path)), expected), "reading twice must not turn twice"


def test_a_rotated_photograph_has_the_size_the_user_sees(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "phone.jpg", exif=exif)
    assert load_picture(tmp_path / "phone.jpg").size == (20, 40)


def test_broken_exif_does_not_cost_the_picture(rgb):
    picture = Image.fromarray(rgb)
    picture.info["exif"] = b"Exif\0\0 not TIFF at all"
    assert np.array_equal(pixels(picture), rgb)


def test_grey_and_black_and_white(tmp_path, rgb):
    grey = rgb[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(pixels(tmp_path / "grey.png"), np.repeat(grey[:, :, None], 3, axis=2))
    bits = grey > 127
    Image.fromarray(bits).save(tmp_path / "bits.png")
    assert np.array_equal(pixels(tmp_path / "bits.png")[:, :, 1], bits * 255)
    assert np.array_equal(pixels(bits)[:, :, 1], bits * 255)
    assert np.array_equal(pixels(grey[:, :, None])[:, :, 2], grey)


def test_palette_with_and_without_a_transparent_entry(tmp_path, rgb):
    palette = Image.fromarray(rgb).quantize(8)
    expected = np.asarray(palette.convert("RGB"))
    palette.save(tmp_path / "palette.gif")
    assert np.array_equal(pixels(tmp_path / "palette.gif"), expected)
    index = int(np.asarray(palette)[0, 0])
    palette.save(tmp_path / "holes.png", transparency=index)
    got = pixels(tmp_path / "holes.png")
    hole = np.asarray(palette) == index
    assert (got[hole] == 255).all()
    assert np.array_equal(got[~hole], expected[~hole])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_lie_on_white(tmp_path, rgb, mode):
    picture = Image.fromarray(rgb).convert(mode)
    alpha = Image.fromarray(np.arange(54, dtype=np.uint8).reshape(6, 9) * 4)
    picture.putalpha(alpha)
    picture.save(tmp_path / "glass.png")
    weight = np.asarray(alpha)[:, :, None] / 255.0
    opaque = np.asarray(picture.convert("RGB"), dtype=float)
    expected = opaque * weight + 255.0 * (1.0 - weight)
    assert np.abs(pixels(tmp_path / "glass.png") - expected).max() <= 1.0


def test_cmyk(tmp_path):
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    cyan.save(tmp_path / "print.jpg", quality=95)
    red, green, blue = pixels(tmp_path / "print.jpg")[4, 4]
    assert red < 30 and green > 200 and blue > 200
    cyan.save(tmp_path / "print.tiff")
    assert tuple(pixels(tmp_path / "print.tiff")[0, 0]) == (0, 255, 255)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bit_is_scaled_not_clipped(tmp_path, kind):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(4, 16)
    path = tmp_path / f"deep.{kind}"
    Image.fromarray(ramp).save(path)
    for source in (path, ramp):
        got = pixels(source)[:, :, 0].astype(float)
        assert np.abs(got - ramp / 257.0).max() <= 0.51
    assert len(np.unique(pixels(path))) > 60


def test_floating_point_grey(tmp_path):
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(4, 16)
    Image.fromarray(ramp).save(tmp_path / "float.tiff")
    for source in (tmp_path / "float.tiff", ramp):
        assert np.abs(pixels(source)[:, :, 0] - ramp * 255.0).max() <= 0.51
    bright = Image.fromarray(ramp * 4000.0)  # such as a depth map in millimetres
    assert np.abs(pixels(bright)[:, :, 0] - ramp * 255.0).max() <= 0.51


def test_one_pixel_and_very_wide_pictures(tmp_path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "one.png")
    assert pixels(tmp_path / "one.png").tolist() == [[[1, 2, 3]]]
    Image.new("L", (20_000, 7), 9).save(tmp_path / "wide.png")
    assert load_picture(tmp_path / "wide.png").size == (20_000, 7)


def test_pictures_beyond_the_limit_are_refused_with_numbers(tmp_path):
    path = tmp_path / "wide.png"
    Image.new("1", (20_000, 5_001)).save(path)
    text = message(path)
    assert str(path) in text and "20,000 x 5,001" in text and f"{MAX_PIXELS:,}" in text
    assert "12 x 10 = 120" in message(np.zeros((10, 12), np.uint8), max_pixels=100)
    Image.new("1", (20_000, 10_000)).save(path)  # beyond Pillow's own limit too
    assert str(path) in message(path) and "200000000" in message(path)


def test_animations_give_their_first_frame(tmp_path):
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    for kind in ("gif", "webp", "tiff"):
        options = {"lossless": True} if kind == "webp" else {}
        frames[0].save(tmp_path / f"moving.{kind}", save_all=True, append_images=frames[1:], **options)
        assert tuple(pixels(tmp_path / f"moving.{kind}")[0, 0]) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "tiff", "bmp"])
def test_truncated_files_are_named_at_every_length(tmp_path, kind):
    whole, part = tmp_path / f"whole.{kind}", tmp_path / f"part.{kind}"
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole)
    data = whole.read_bytes()
    for share in (0.02, 0.3, 0.7):
        part.write_bytes(data[: int(len(data) * share)])
        assert str(part) in message(part)


def test_a_truncated_picture_that_the_caller_opened(tmp_path):
    path = tmp_path / "part.png"
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[:1500])  # Pillow opens it and reads its pixels only later
    assert "damaged" in message(Image.open(path))


def test_files_that_are_no_pictures(tmp_path):
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    assert "notes.txt is not a picture" in message(tmp_path / "notes.txt")
    assert "empty.png is empty" in message(tmp_path / "empty.png")
    assert "is a folder" in message(tmp_path)
    assert "There is no picture" in message(tmp_path / "nowhere.png")
    assert "There is no picture" in message("x" * 5000)
    assert "download the picture" in message("https://example.org/picture.png")
    for source in ("", "a\0b"):
        assert "not the path" in message(source)
    assert "not NoneType" in message(None)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((3, 8, 8), np.uint8), "move the channels"),
        (np.zeros((2, 8, 8, 3), np.uint8), "one picture at a time"),
        (np.zeros((8, 8, 2), np.uint8), "channels"),
        (np.zeros((0, 8), np.uint8), "at least one pixel"),
        (np.zeros((8, 8), np.int64), "int64"),
        (np.full((8, 8), 255.0), "Divide"),
        (np.full((8, 8), np.nan), "NaN"),
    ],
)
def test_arrays_that_cannot_be_pictures(array, says):
    assert says in message(array)


def test_array_with_alpha_lies_on_white():
    assert (pixels(np.zeros((4, 4, 4), np.uint8)) == 255).all()
