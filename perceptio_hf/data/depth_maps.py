"""Reading and writing depth maps, whatever unit they come in.

Inside the package depth is relative inverse depth in [0, 1], 1 = nearest, float32, (height, width):
(1/z - 1/z_far) / (1/z_near - 1/z_far) over the valid pixels of one map. The caller says what a file holds:

    unit          values                                        not valid
    "mm", "m"     distance along the optical axis               0, negative, NaN, infinite, and the largest value of
    "m/256"       the same in 256ths of a metre (KITTI)         an integer type (sensors write it for "no reading")
    "disparity"   any affine function of 1/z, larger = nearer   NaN, infinite; of integers also 0 and below (what
                                                                matchers write for "no match") and the largest value
    "relative"    0..1 (8/16-bit integers: 0..255 / 0..65535)   NaN, infinite

What lies outside of the range of float32, 1.2e-38 to 3.4e38, counts as 0 or infinite.
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from perceptio_hf.files import write_picture

from .arrays import read_array

_METRES = {"mm": 0.001, "m": 1.0, "m/256": 1 / 256}  # of one step
UNITS = (*_METRES, "disparity", "relative")
SUFFIXES = (".png", ".tif", ".tiff", ".npy", ".npz")
MAX_PIXELS = 80_000_000
_TRANSPOSED = 0.05  # relative difference of side ratios up to which a depth map counts as lying on its side
_FORMATS = ("PNG", "TIFF")
_FLOAT32 = np.finfo(np.float32)
_DEEP_COLOUR = ("RGB;16", "RGBA;16", "LA;16")  # how Pillow names what it shortens to 8 bits when it reads


@dataclass(frozen=True, eq=False)
class DepthMap:
    """One depth map.

    Args:
        relative: (H, W) float32 in [0, 1], 1 = nearest, 0 where not valid.
        valid: (H, W) bool, True where the map has a reading.
        metric: (H, W) float32 distance in metres, 0 where not valid; None when the scale is unknown.
    """

    relative: np.ndarray
    valid: np.ndarray
    metric: np.ndarray | None = None

    @classmethod
    def from_metric(cls, depth_m: np.ndarray, valid: np.ndarray | None = None) -> "DepthMap":
        """Wrap distances in metres. Arguments and errors as `relative_from_metric`."""
        depth_m, valid = _checked_metric(depth_m, valid)
        return cls(relative_from_metric(depth_m, valid), valid, np.where(valid, depth_m, 0.0).astype(np.float32))

    def check_orientation(self, picture: tuple[int, int]) -> None:
        """Compare with the (width, height) of the picture as it is shown.

        Raises:
            ValueError: where the map lies while the picture stands: it was not turned with it. Any other size is fine.
        """
        height, width = self.relative.shape
        mirrored = height / width * (picture[1] / picture[0])
        if abs(mirrored - 1) < _TRANSPOSED and abs(height / width - 1) > 2 * _TRANSPOSED:
            raise ValueError(
                f"its depth map is {width} x {height} and its picture, shown upright, {picture[0]} x {picture[1]}; "
                "turn the depth map as well."
            )


def relative_from_metric(depth_m: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Convert distances to relative inverse depth.

    Args:
        depth_m: (H, W) distances in any one unit. 0, negative and non-finite ones count as holes.
        valid: (H, W) bool; False marks further holes.

    Returns:
        (H, W) float32 in [0, 1], 1 = nearest, 0 in holes.

    Raises:
        ValueError: No valid pixel, or the same depth everywhere.
    """
    depth_m, valid = _checked_metric(depth_m, valid)
    inverse = np.zeros(depth_m.shape, np.float64)
    np.divide(1.0, depth_m, out=inverse, where=valid)
    return _stretch(inverse, valid)


def relative_from_disparity(disparity: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Convert disparity, or any affine function of inverse depth, to relative inverse depth.

    Args, result and errors as `relative_from_metric`, but only non-finite values count as holes.
    """
    disparity = _as_plane(disparity, "disparity")
    return _stretch(disparity, _joined_valid(_is_finite(disparity), valid))


def read_depth(path: str | os.PathLike, unit: str, valid: np.ndarray | None = None) -> DepthMap:
    """Read a depth map from a grey .png (8 or 16 bits) or .tif (floats too), a .npy, or a .npz with one array or one
    named "depth". Three equal colour channels count as grey.

    Args:
        path: The file.
        unit: What its values are, one of `UNITS` (see the table above).
        valid: (H, W) bool; False marks further holes.

    Raises:
        ValueError: The file is missing, damaged, too large, of another kind or shape; the unit is unknown; no pixel is
            valid, or all hold the same depth.
    """
    _check_unit(unit)
    path = Path(path)
    values = _read_array(path)
    try:
        return depth_from_values(values, unit, valid)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def depth_from_values(values: np.ndarray | Image.Image, unit: str, valid: np.ndarray | None = None) -> DepthMap:
    """The depth map of numbers in memory: an array (H, W), or a grey picture of integers or floats.

    Args and errors as `read_depth`.
    """
    _check_unit(unit)
    values = grey_values(values) if isinstance(values, Image.Image) else _one_channel(np.asarray(values))
    if values.ndim != 2 or values.size == 0 or values.dtype.kind not in "iuf":
        raise ValueError(f"depth is {values.dtype} of shape {values.shape}; expected (height, width) numbers.")
    is_whole = values.dtype.kind in "iu"
    full = np.iinfo(values.dtype).max if is_whole else np.inf
    if unit in _METRES:
        metres = _wide(values) * _METRES[unit]
        return DepthMap.from_metric(metres, _joined_valid(values != full, valid))
    if unit == "disparity":
        finite = _joined_valid((values > 0) & (values != full) if is_whole else _is_finite(_wide(values)), valid)
        return DepthMap(relative_from_disparity(values, finite), finite)
    return _from_relative(values, _joined_valid(np.isfinite(values), valid))


def write_depth_png(path: str | os.PathLike, relative: np.ndarray, valid: np.ndarray | None = None) -> None:
    """Write relative inverse depth as a 16-bit grey PNG: 65535 = nearest, 0 = farthest or not valid.

    The file appears complete or not at all.

    Raises:
        ValueError: `relative` is not (H, W), or a valid pixel lies outside [0, 1].
    """
    write_picture(path, depth_picture(relative, valid))


def depth_picture(relative: np.ndarray, valid: np.ndarray | None = None) -> Image.Image:
    """What `write_depth_png` writes, as a picture of 16 bits; errors as there."""
    relative = _as_plane(relative, "relative depth")
    valid = _joined_valid(np.ones(relative.shape, bool), valid)
    _check_unit_interval(relative, valid)
    grey = np.where(valid, np.round(np.clip(np.where(valid, relative, 0.0), 0.0, 1.0) * 65535.0), 0.0)
    return Image.fromarray(grey.astype(np.uint16))


def list_depth_folder(folder: str | os.PathLike, pattern: str | None = None) -> list[Path]:
    """List the depth maps of a folder, sorted by name.

    Args:
        folder: The folder; sub-folders are searched only where the pattern says so.
        pattern: Which files, such as "*.depth.png"; None takes every .png, .tif, .npy and .npz.

    Raises:
        ValueError: The folder is missing, or nothing in it matches.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of depth maps.")
    paths = sorted(p for p in folder.glob(pattern or "*") if p.is_file() and p.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} holds no depth map matching {pattern or ', '.join(SUFFIXES)!r}.")
    return paths


def _check_unit(unit: str) -> None:
    if unit not in UNITS:
        raise ValueError(f"Unknown depth unit {unit!r}; say which one the values have: {', '.join(UNITS)}.")


def _from_relative(values: np.ndarray, valid: np.ndarray) -> DepthMap:
    if values.dtype.kind in "iu":
        if values.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"relative depth as {values.dtype} has no known full scale; use uint8, uint16 or float.")
        values = values / np.iinfo(values.dtype).max
    _check_spread(values, valid)
    _check_unit_interval(values, valid)
    return DepthMap(np.where(valid, np.clip(values, 0.0, 1.0), 0.0).astype(np.float32), valid)


def _checked_metric(depth_m: np.ndarray, valid: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    depth_m = _as_plane(depth_m, "depth")
    # Neither the distance in float32 nor its inverse is infinite or 0 then.
    return depth_m, _joined_valid((depth_m >= _FLOAT32.tiny) & (depth_m <= _FLOAT32.max), valid)


def _is_finite(values: np.ndarray) -> np.ndarray:
    """Where float64 numbers are finite in float32 too, so that differences of them are finite."""
    return np.abs(values) <= _FLOAT32.max


def _stretch(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Min-max over valid pixels -> float32 in [0, 1], 0 elsewhere."""
    low, high = _check_spread(values, valid)
    stretched = (np.where(valid, values, low) - low) / (high - low)
    return stretched.astype(np.float32)


def _check_spread(values: np.ndarray, valid: np.ndarray) -> tuple[float, float]:
    if not valid.any():
        raise ValueError("no pixel holds a valid depth (all are 0, negative, NaN or infinite, or masked).")
    low, high = float(values[valid].min()), float(values[valid].max())
    if high - low <= 1e-7 * max(abs(low), abs(high)):
        raise ValueError("every valid pixel has the same depth; relative depth is undefined for a constant picture.")
    return low, high


def _check_unit_interval(values: np.ndarray, valid: np.ndarray) -> None:
    wrong = valid & ~((values >= -1e-6) & (values <= 1.0 + 1e-6))
    if wrong.any():
        raise ValueError(
            f"relative depth must lie in [0, 1], found {values[wrong][0]:g}; "
            "if these are distances or disparities, give their unit instead."
        )


def _joined_valid(own: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    if valid is None:
        return own
    if np.shape(valid) != own.shape:
        raise ValueError(f"the validity mask is {np.shape(valid)}, the depth map {own.shape}; give the same shape.")
    return own & np.asarray(valid, dtype=bool)


def _as_plane(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or values.size == 0 or values.dtype.kind not in "iuf":
        raise ValueError(f"{name} is {values.dtype} of shape {values.shape}; expected (height, width) numbers.")
    return _wide(values)


def _wide(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # longer floats become infinite
        return values.astype(np.float64)


def _read_array(path: Path) -> np.ndarray:
    """The numbers of a file as they stand, (H, W), or a ValueError that names the file."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} is not a depth map this package reads; expected {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise ValueError(f"There is no depth map {path}.")
    is_array = path.suffix.lower() in (".npy", ".npz")
    try:
        values = read_array(path) if is_array else _read_picture(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ValueError(f"{path} cannot be read as {path.suffix}: {error or type(error).__name__}") from None
    return _checked_array(values, path)


def _checked_array(values: np.ndarray, path: Path) -> np.ndarray:
    if values.dtype.kind not in "iuf":
        raise ValueError(f"{path} holds {values.dtype} values; expected integers or floating point numbers.")
    shape, values = values.shape, _one_channel(values)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"{path} holds an array of shape {shape}; expected (height, width).")
    if values.size > MAX_PIXELS:
        raise ValueError(f"{path} has {values.size} pixels; more than {MAX_PIXELS} are not read.")
    return values


def _one_channel(values: np.ndarray) -> np.ndarray:
    """(1, H, W), (H, W, 1) and three equal channels (H, W, 3) -> (H, W); others as they are."""
    if values.ndim != 3:
        return values
    if values.shape[0] == 1:
        return values[0]
    is_grey = values.shape[2] == 1 or (values.shape[2] == 3 and bool((values == values[..., :1]).all()))
    return values[..., 0] if is_grey else values


def _read_picture(path: Path) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
        try:
            picture = Image.open(path, formats=_FORMATS)
        except Image.DecompressionBombError as error:
            raise ValueError(str(error)) from None
    with picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels; more than {MAX_PIXELS} are not read.")
        return grey_values(picture)


def grey_values(picture: Image.Image) -> np.ndarray:
    """The numbers of a grey picture, or of one of three equal channels.

    Returns:
        (H, W) uint8, uint16, int32 or float32.

    Raises:
        ValueError: for colour, transparency, and pictures of one bit.
    """
    if picture.mode == "L" and "transparency" not in picture.info:
        return np.array(picture)
    if picture.mode == "F":
        return np.array(picture)
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        values = np.array(picture)
        return values.astype(np.uint16) if values.min() >= 0 and values.max() <= 65535 else values
    kind = next((str(tile[3]) for tile in getattr(picture, "tile", ())), "")
    if picture.mode in ("L", "LA", "P", "RGB", "RGBA") and not any(deep in kind for deep in _DEEP_COLOUR):
        colour = np.array(picture.convert("RGBA"))
        if (colour[..., 3] == 255).all() and (colour[..., :3] == colour[..., :1]).all():
            return colour[..., 0]
    raise ValueError(
        f"a picture of mode {picture.mode}{' with 16 bits' if ';16' in kind else ''}; depth is one grey channel of 8 "
        "or 16 bits or floats (or three equal ones of 8 bits), not colour."
    )
