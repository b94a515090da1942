"""Every kind of picture a user may hand in becomes upright 8-bit RGB, or one clear error."""

import base64
import io
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
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
    assert "download the picture" in message("s3://bucket/picture.png")
    for source in ("", "a\0b"):
        assert "not the path" in message(source)
    assert "not NoneType" in message(None)


@pytest.mark.parametrize(
    ("array", "says"),
    [
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


def test_channels_first_and_tensors(rgb):
    first = np.ascontiguousarray(rgb.transpose(2, 0, 1))
    for source in (first, torch.from_numpy(first), torch.from_numpy(rgb), torch.from_numpy(first) / 255):
        assert np.array_equal(pixels(source), rgb)
    half = (torch.from_numpy(first) / 255).to(torch.bfloat16)  # numpy has no such type
    assert np.abs(pixels(half).astype(int) - rgb).max() <= 1
    assert np.array_equal(pixels(torch.from_numpy(first[:1]))[:, :, 2], rgb[:, :, 0])
    square = rgb[:3, :5].copy()  # (3, 5, 3): an array has its channels last, a tensor first
    assert load_picture(square).size == (5, 3) and load_picture(torch.from_numpy(square)).size == (3, 5)
    assert "must hold values" in message(torch.zeros(3, 4, 4, device="meta"))


def test_a_picture_need_not_be_copied(rgb):
    mine = Image.fromarray(rgb)
    assert load_picture(mine, copy=False) is mine
    assert load_picture(mine.convert("L"), copy=False).mode == "RGB"


@pytest.mark.parametrize("compression", ["raw", "jpeg"])  # Pillow 11.0 writes others wrongly
def test_ycbcr_tiff(tmp_path, compression):
    colours = np.repeat(np.repeat(np.array([[[250, 20, 10], [10, 200, 30]]], np.uint8), 16, 0), 8, 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(colours).convert("YCbCr").save(tmp_path / "a.tiff", compression=compression, exif=exif)
    assert np.abs(pixels(tmp_path / "a.tiff").astype(int) - np.rot90(colours, -1)).max() <= (
        6 if compression == "jpeg" else 3
    )


def test_ycbcr_tiff_that_is_cut_off(tmp_path):
    Image.new("YCbCr", (16, 16)).save(tmp_path / "a.tiff")
    whole = (tmp_path / "a.tiff").read_bytes()
    (tmp_path / "a.tiff").write_bytes(whole[:-100])
    assert "damaged" in message(tmp_path / "a.tiff")


@pytest.mark.parametrize("kind", ["RGBA", "LA", "I;16", "F", "transparent"])
def test_conversion_in_strips_changes_nothing(monkeypatch, rgb, kind):
    if kind in ("RGBA", "LA"):
        picture = Image.fromarray(rgb).convert(kind)
        picture.putalpha(Image.fromarray(rgb[:, :, 0]))
    elif kind == "transparent":
        picture = Image.fromarray(rgb).quantize(8)
        picture.info["transparency"] = int(np.asarray(picture)[0, 0])
    else:
        picture = Image.fromarray(rgb[:, :, 0].astype(np.uint16 if kind == "I;16" else np.float32) * 250)
    expected = pixels(picture)
    monkeypatch.setattr("perceptio_hf.processing.pictures._STRIP", 9)
    assert np.array_equal(pixels(picture), expected)


class Web(BaseHTTPRequestHandler):
    """A server that knows a picture, a page, an empty file, a way elsewhere, and a loop."""

    png = b""

    def do_GET(self):
        if self.path in ("/loop", "/moved"):
            self.send_response(302)
            self.send_header("Location", "/a%20picture.png" if self.path == "/moved" else "/loop")
            self.end_headers()
            return
        answers = {"/a%20picture.png": self.png, "/page": b"<html>no picture</html>", "/empty": b""}
        self.send_response(200 if self.path in answers else 404)
        self.end_headers()
        self.wfile.write(answers.get(self.path, b""))

    def log_message(self, *_):
        pass


@pytest.fixture
def web(rgb):
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "PNG")
    Web.png = file.getvalue()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_web_addresses(web, rgb, monkeypatch):
    for name in ("/a%20picture.png", "/a picture.png", "/moved"):
        assert np.array_equal(pixels(web + name), rgb)
    assert "404" in message(web + "/nothing")
    assert "loop" in message(web + "/loop")
    assert "page is not a picture" in message(web + "/page")
    assert "is empty" in message(web + "/empty")
    monkeypatch.setattr("perceptio_hf.processing.picture_sources.MAX_BYTES", 20)
    assert "larger than 20 bytes" in message(web + "/moved")


def test_web_addresses_that_do_not_answer(web):
    assert "cannot be fetched" in message("http://127.0.0.1:1/a.png")
    assert "cannot be fetched" in message("http://[broken/a.png")
    assert "cannot be fetched" in message("https://" + web.removeprefix("http://"))


def test_only_a_web_address_opens_a_socket(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    for source in (
        "ftp://host/a.png",
        "//host/a.png",
        "file://host/a.png",
        "hf://a/b.png",
        tmp_path / "http:" / "a.png",
    ):
        message(source)


def test_pictures_as_text(tmp_path, rgb, monkeypatch):
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    wrapped = "\n".join(text[start : start + 60] for start in range(0, len(text), 60))
    percent = "data:image/png," + "".join(f"%{byte:02x}" for byte in file.getvalue())
    for source in (
        text,
        text.rstrip("="),
        wrapped,
        f"data:image/png;base64,{text}",
        f"data:;base64,{wrapped}",
        percent,
    ):
        assert np.array_equal(pixels(source), rgb)
    for source in ("data:", "data:image/png;base64,", "data:image/png;base64,a", "data:image/png;base64,???"):
        assert "holds no picture" in message(source)
    assert "is not a picture" in message("data:text/plain,hello")
    monkeypatch.chdir(tmp_path)
    (tmp_path / text[:50]).write_bytes(file.getvalue())
    assert np.array_equal(pixels(text[:50]), rgb), "a file of that name comes first"
    for source in ("data" * 5000, "/home/somebody/pictures/of/the/holidays/0001"):
        assert "There is no picture" in message(source) and len(message(source)) < 300


def test_names_that_are_not_utf_8(tmp_path, rgb):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    Image.fromarray(rgb).save(path)
    for source in (path, Path(path), Path(path).as_uri()):
        assert np.array_equal(pixels(source), rgb)
    os.truncate(path, 60)
    message(path).encode("utf-8")  # the error can be printed


def test_array_with_alpha_lies_on_white():
    assert (pixels(np.zeros((4, 4, 4), np.uint8)) == 255).all()
