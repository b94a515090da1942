"""Reads a picture of any common kind as upright 8-bit RGB.

Only the standard library, numpy and Pillow: this file travels with a checkpoint and must load where the package is not
installed.
"""

import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .picture_sources import find_picture

MAX_PIXELS = 100_000_000  # 20,000 x 5,000; what that takes in memory, `load_picture` says
_ORIENTATION, _STORED_UPRIGHT = 0x0112, 1  # EXIF tag, and its value for a picture that is stored as it is seen
_STRIP = 2_000_000  # pixels that are converted at a time, so that what a conversion takes in between stays small
_PHOTOMETRIC, _COMPRESSION, _OFFSETS, _SIZES, _PLANES, _SUBSAMPLING = 262, 259, 273, 279, 284, 530  # tags of TIFF
_YCBCR, _UNCOMPRESSED, _INTERLEAVED = 6, 1, 1  # and values of theirs


def load_picture(source: Any, *, max_pixels: int = MAX_PIXELS, copy: bool = True) -> Image.Image:
    """One picture as RGB, 8 bits per channel, the way a viewer shows it.

    EXIF orientation is applied, so width and height are those the user sees. Transparent pixels are laid on white.
    Deep grey values are scaled, not clipped: 16 bit from [0, 65535], floats from [0, 1], anything brighter from its own
    maximum. Of an animation the first frame is taken.

    Memory: Pillow keeps 4 bytes a pixel, 400 MB for the largest picture. That is what a file of an upright RGB picture
    takes; where a picture must be turned or converted, the old and the new one lie in memory together, 800 MB. (A
    progressive JPEG takes another 6 bytes a pixel inside libjpeg.)

    Args:
        source: a path; a web address, which is fetched; a file://, data: URL or base64 text; a Pillow picture (left
            unchanged); or an array or torch tensor (height, width), (height, width, channels) or (channels, height,
            width) with 1, 3 or 4 channels, of uint8, uint16, bool, or float in [0, 1]. Where both ends could be the
            channels, an array has them last and a tensor first, as is the custom.
        max_pixels: the largest width x height to decode.
        copy: False may give back a Pillow picture itself where it is upright RGB already.

    Raises:
        ValueError: for a path that is missing, a folder, empty, truncated, not a picture; for an address that cannot be
            fetched; for a picture of more than `max_pixels`; for an array of another shape, type or range. The text
            names the path and says what to do.
    """
    if isinstance(source, Image.Image):
        _check_size(source.size, "This picture", max_pixels)
        return _decode(source, "This picture", copy=copy)
    if isinstance(source, (str, os.PathLike)):
        return _from_file(*find_picture(os.fsdecode(source)), max_pixels)
    if hasattr(source, "__array__"):
        array = _channels_last(_as_array(source), tensor=hasattr(source, "detach"))
        return _decode(_from_array(array, max_pixels), "This array", copy=False)
    raise ValueError(
        f"A picture is a path, an address, a Pillow picture, an array or a tensor, not {type(source).__name__}."
    )


def row_strips(width: int, height: int) -> Iterator[tuple[int, int]]:
    """The rows of a picture in parts of about 2 million pixels: (first, end), (first, end) ..."""
    rows = max(1, _STRIP // max(1, width))
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


def _from_file(file: Path | io.BytesIO, what: str, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit comes next
            picture = Image.open(file)
    except UnidentifiedImageError:
        name = what.removeprefix("The picture ")
        raise ValueError(f"{name} is not a picture that can be read; give a JPEG, PNG, WebP or TIFF file.") from None
    except Image.DecompressionBombError as error:  # beyond Pillow's limit, whatever ours is
        raise ValueError(f"{what} is too large ({error}); scale it down first.") from None
    except PermissionError:
        raise ValueError(f"{what} may not be read; check its permissions.") from None
    except Exception as error:
        raise _damaged(what, error) from None
    with picture:
        _check_size(picture.size, what, max_pixels)
        return _decode(picture, what, copy=False)


def _decode(picture: Image.Image, what: str, copy: bool) -> Image.Image:
    """Load the pixels, turn them upright, make them RGB."""
    try:
        picture = _raw_ycbcr(picture) or picture
        picture.load()
        return _to_rgb(_upright(picture), copy)
    except Exception as error:  # on broken data Pillow's decoders raise OSError, SyntaxError, struct.error and more
        raise _damaged(what, error) from None


def _damaged(what: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ValueError(f"{what} is damaged, incomplete or of an unsupported kind ({reason}); save or copy it again.")


def _check_size(size: tuple[int, int], what: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"{what} is {width} x {height} pixels; it needs at least one pixel.")
    if width * height > max_pixels:
        raise ValueError(
            f"{what} has {width:,} x {height:,} = {width * height:,} pixels, more than the limit of {max_pixels:,}; "
            "scale it down first."
        )


def _raw_ycbcr(picture: Image.Image) -> Image.Image | None:
    """An uncompressed TIFF of YCbCr values, which Pillow writes but takes for RGB when it reads; None for any other.

    Raises:
        ValueError: where the colours are stored at a lower resolution, or the file is too short.
    """
    tags = getattr(picture, "tag_v2", {})
    if picture.format != "TIFF" or (tags.get(_PHOTOMETRIC), tags.get(_COMPRESSION, 1)) != (_YCBCR, _UNCOMPRESSED):
        return None
    if tuple(tags.get(_SUBSAMPLING, (2, 2))) != (1, 1) or tags.get(_PLANES, 1) != _INTERLEAVED or _OFFSETS not in tags:
        raise ValueError("uncompressed YCbCr in blocks; save it compressed or as RGB")
    pixels = bytearray()
    for offset, size in zip(tags[_OFFSETS], tags[_SIZES], strict=True):
        picture.fp.seek(offset)
        pixels += picture.fp.read(size)
    plain = Image.frombytes("YCbCr", picture.size, pixels)
    plain.info["exif"] = picture.getexif().tobytes()
    return plain


def _upright(picture: Image.Image) -> Image.Image:
    """Turn or mirror as EXIF says. Unreadable EXIF data counts as none: the pixels are still good."""
    try:
        orientation = picture.getexif().get(_ORIENTATION, _STORED_UPRIGHT)
    except Exception:
        return picture
    return picture if orientation == _STORED_UPRIGHT else ImageOps.exif_transpose(picture)


def _to_rgb(picture: Image.Image, copy: bool) -> Image.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture.copy() if copy else picture
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return _grey(picture)
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        return _on_white(picture)
    return picture.convert("RGB")


def _on_white(picture: Image.Image) -> Image.Image:
    """A picture with transparent pixels as RGB."""
    opaque = Image.new("RGB", picture.size)
    for top, end in row_strips(*picture.size):
        part = picture.crop((0, top, picture.width, end)).convert("RGBA")
        opaque.paste(Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB"), (0, top))
    return opaque


def _grey(picture: Image.Image) -> Image.Image:
    """Pillow's deep modes (16 bit, 32 bit, float) as RGB. Pillow's own conversion clips at 255."""
    strips = list(row_strips(*picture.size))
    brightest = max(_brightest(_values(picture, *strip)) for strip in strips)
    full = max(1.0 if picture.mode == "F" else 65535.0, brightest)
    grey = Image.new("L", picture.size)
    for strip in strips:
        values = np.nan_to_num(_values(picture, *strip) / full, nan=0.0, posinf=1.0, neginf=0.0)
        grey.paste(Image.fromarray(_to_bytes(values)), (0, strip[0]))
    return grey.convert("RGB")


def _values(picture: Image.Image, top: int, end: int) -> np.ndarray:
    """Rows of a deep grey picture, float64."""
    return np.asarray(picture.crop((0, top, picture.width, end))).astype(np.float64)


def _brightest(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size else 0.0


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """[0, 1] -> uint8, rounded."""
    return (np.clip(values, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _as_array(source: Any) -> np.ndarray:
    """An array, or a tensor of torch's, wherever it lies, as an array."""
    if not hasattr(source, "detach"):
        return np.asarray(source)
    try:
        tensor = source.detach().cpu()
        return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()  # numpy knows no bfloat16
    except Exception as error:
        raise ValueError(f"A picture as a tensor must hold values: {' '.join(str(error).split())[:200]}") from None


def _channels_last(array: np.ndarray, tensor: bool) -> np.ndarray:
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and (tensor or array.shape[2] not in (1, 3, 4)):
        return np.moveaxis(array, 0, 2)
    return array


def _from_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(
            f"A picture as an array is (height, width), or has 1, 3 or 4 channels first or last, not {array.shape}; "
            "pass one picture at a time."
        )
    height, width = array.shape[:2]
    _check_size((width, height), "This array", max_pixels)
    values = np.empty(array.shape, dtype=np.uint8)
    for top, end in row_strips(width, height):
        values[top:end] = _array_bytes(array[top:end])
    return Image.fromarray(values[:, :, 0] if values.ndim == 3 and values.shape[2] == 1 else values)


def _array_bytes(array: np.ndarray) -> np.ndarray:
    """uint8, uint16, bool or float in [0, 1] -> uint8."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_ or array.dtype == np.uint16:
        return _to_bytes(array / (1.0 if array.dtype == np.bool_ else 65535.0))
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"A picture as an array is uint8, uint16, bool or float, not {array.dtype}; convert it first.")
    if not np.isfinite(array).all() or array.min() < 0.0 or array.max() > 1.0:
        raise ValueError(
            "A picture as a float array has values in [0, 1]; this one has others (or NaN). Divide 8-bit values by 255."
        )
    return _to_bytes(array)
