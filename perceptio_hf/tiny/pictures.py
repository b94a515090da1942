"""Reads a picture of any common kind as upright 8-bit RGB.

Only the standard library, numpy and Pillow: this file travels with a checkpoint and must load where the package is not
installed.
"""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000  # 20,000 x 5,000; such a picture takes 300 MB once decoded
_REMOTE = ("http://", "https://", "ftp://", "s3://", "hf://", "data:")
_ORIENTATION, _STORED_UPRIGHT = 0x0112, 1  # EXIF tag, and its value for a picture that is stored as it is seen


def load_picture(source: str | Path | Image.Image | np.ndarray, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """One picture as RGB, 8 bits per channel, the way a viewer shows it.

    EXIF orientation is applied, so width and height are those the user sees. Transparent pixels are laid on white.
    Deep grey values are scaled, not clipped: 16 bit from [0, 65535], floats from [0, 1], anything brighter from its own
    maximum. Of an animation the first frame is taken.

    Args:
        source: a path, a Pillow picture (left unchanged), or an array (height, width) or (height, width, 1, 3 or 4)
            of uint8, uint16, bool, or float in [0, 1].
        max_pixels: the largest width x height to decode.

    Raises:
        ValueError: for a path that is missing, a folder, empty, truncated, not a picture, or a web address; for a
            picture of more than `max_pixels`; for an array of another shape, type or range. The text names the path
            and says what to do.
    """
    if isinstance(source, np.ndarray):
        return _decode(_from_array(source, max_pixels), "This array")
    if isinstance(source, Image.Image):
        _check_size(source.size, "This picture", max_pixels)
        return _decode(source, "This picture")
    if isinstance(source, (str, os.PathLike)):
        return _from_file(_existing_file(os.fspath(source)), max_pixels)
    raise ValueError(f"A picture is a path, a Pillow picture or a numpy array, not {type(source).__name__}.")


def _existing_file(name: str) -> Path:
    if name.lower().startswith(_REMOTE):
        raise ValueError(f"{name[:100]} is not a local file; download the picture first and give its path.")
    if not name or "\0" in name:
        raise ValueError(f"{name!r} is not the path of a picture.")
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; name the pictures in it, e.g. {os.path.join(path, '*.jpg')}.")
    if not os.path.exists(
        path
    ):  # os.path, unlike pathlib, also says no where the name is too long or the folder closed
        raise ValueError(f"There is no picture {path}; check the path.")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not an ordinary file; give the path of a picture.")
    if os.path.getsize(path) == 0:
        raise ValueError(f"The picture {path} is empty (0 bytes); copy or download it again.")
    return Path(path)


def _from_file(path: Path, max_pixels: int) -> Image.Image:
    what = f"The picture {path}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit comes next
            picture = Image.open(path)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture that can be read; give a JPEG, PNG, WebP or TIFF file.") from None
    except Image.DecompressionBombError as error:  # beyond Pillow's limit, whatever ours is
        raise ValueError(f"{what} is too large ({error}); scale it down first.") from None
    except PermissionError:
        raise ValueError(f"{what} may not be read; check its permissions.") from None
    except Exception as error:
        raise _damaged(what, error) from None
    with picture:
        _check_size(picture.size, what, max_pixels)
        return _decode(picture, what)


def _decode(picture: Image.Image, what: str) -> Image.Image:
    """Load the pixels, turn them upright, make them RGB. Always a new picture."""
    try:
        picture.load()
        return _to_rgb(_upright(picture))
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


def _upright(picture: Image.Image) -> Image.Image:
    """Turn or mirror as EXIF says. Unreadable EXIF data counts as none: the pixels are still good."""
    try:
        orientation = picture.getexif().get(_ORIENTATION, _STORED_UPRIGHT)
    except Exception:
        return picture
    return picture if orientation == _STORED_UPRIGHT else ImageOps.exif_transpose(picture)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture.copy()
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return _grey_picture(_stretched(np.asarray(picture).astype(np.float64), picture.mode))
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        colour = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB")
    return picture.convert("RGB")


def _stretched(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of Pillow's deep modes (16 bit, 32 bit, float) -> [0, 1]. Pillow's own conversion clips at 255."""
    finite = values[np.isfinite(values)]
    brightest = float(finite.max()) if finite.size else 0.0
    full = max(1.0 if mode == "F" else 65535.0, brightest)
    return np.nan_to_num(values / full, nan=0.0, posinf=1.0, neginf=0.0)


def _grey_picture(values: np.ndarray) -> Image.Image:
    return Image.fromarray(_to_bytes(values)).convert("RGB")


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """[0, 1] -> uint8, rounded."""
    return (np.clip(values, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _from_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(
            f"A picture as an array is (height, width) or (height, width, 1, 3 or 4 channels), not {array.shape}; "
            "move the channels to the end and pass one picture at a time."
        )
    _check_size((array.shape[1], array.shape[0]), "This array", max_pixels)
    values = _array_bytes(array)
    return Image.fromarray(values[:, :, 0] if values.ndim == 3 and values.shape[2] == 1 else values)


def _array_bytes(array: np.ndarray) -> np.ndarray:
    """uint8, uint16, bool or float in [0, 1] -> uint8."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_ or array.dtype == np.uint16:
        return _to_bytes(array / (1.0 if array.dtype == np.bool_ else 65535.0))
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"A picture as an array is uint8, uint16, bool or float, not {array.dtype}; convert it first.")
    if not np.isfinite(array).all() or array.min() < 0.0 or array.max() > 1.0:
        raise ValueError(
            "A picture as a float array has values in [0, 1]; this one has others (or NaN). Divide 8-bit values by 255."
        )
    return _to_bytes(array)
