"""Masks as people have them, polygons, pictures, probabilities -> (height, width) bool: read right, or refused."""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from perceptio_hf.processing.pictures import MAX_PIXELS

from .arrays import read_array
from .run_length import decode_mask, read_counts

_REACH = 10  # sides of the picture; drawing a polygon takes memory by its length
_UPSAMPLED = 5  # COCO draws the outline at five times the size
_MOST_LABELS = 32  # a plane of more different values is no picture of labels
_WHITES = (255, 65535)
_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
_DARK, _BRIGHT = 63, 192  # what 0 and 255 become at the most when they are stored with loss


class EmptyMask(ValueError):
    """Polygons that hold no pixel."""


def mask_of(source: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    """A mask in any of its forms (see `perceptio_hf.data.samples.Sample`), its bytes decoded.

    Args:
        source: run lengths; rows of numbers or polygons; the path of a picture or .npy file; a picture; an array.
        size: (height, width) of its picture, which tells rows of numbers from polygons.

    Returns:
        (height, width) bool, not necessarily of that size.

    Raises:
        ValueError: for what is no mask, or could be one in two ways.
    """
    if isinstance(source, Mapping):
        if source.get("polygons") is None:
            return _decoded(source)
        source = source["polygons"]
    if isinstance(source, (list, tuple)):
        return _mask_of_rows(source, size)
    if isinstance(source, (str, os.PathLike)):
        return _read_mask(source)
    return mask_of_picture(source) if isinstance(source, Image.Image) else mask_of_values(np.asarray(source))


def _decoded(lengths: Mapping) -> np.ndarray:
    counts = read_counts(lengths)
    if counts.sum() > MAX_PIXELS:
        raise ValueError(f"it has {counts.sum()} pixels; more than {MAX_PIXELS} are not read")
    return decode_mask(lengths)


def mask_of_values(values: np.ndarray) -> np.ndarray:
    """(height, width) numbers -> bool. Whole numbers are labels, 0 is outside; floats are 0 and one other value, or
    probabilities, inside from 0.5 on.

    Raises:
        ValueError: for other shapes and types, and for values whose meaning cannot be told.
    """
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values[0] if values.shape[0] == 1 else values[..., 0]
    if values.ndim != 2 or values.size == 0 or values.dtype.kind not in "biuf":
        raise ValueError(f"a mask is (height, width) numbers, not {values.dtype} of shape {values.shape}")
    if values.dtype.kind == "b":
        return values
    return _mask_of_floats(values) if values.dtype.kind == "f" else _mask_of_labels(values)


def _mask_of_floats(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0:
        raise ValueError("it holds NaN, infinite or negative numbers; turn them into 0 and 1 first")
    if high <= 1:
        if 0 < high < 0.5:
            raise ValueError(f"its highest value is {high:g}; probabilities of a mask reach 0.5, and labels 1")
        return values >= 0.5
    if not ((values == 0) | (values == high)).all():
        raise ValueError(f"its numbers are neither probabilities nor two-valued (up to {high:g}); make them 0 and 1")
    return values > 0


def _mask_of_labels(values: np.ndarray) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    if ((values == 0) | (values == high)).all():
        return values != 0
    if low:
        raise ValueError(f"its values are {low} to {high} without any 0, which is outside; make it 0 and 1")
    if high in _WHITES or len(np.unique(values)) > _MOST_LABELS:
        raise ValueError(
            f"it has grey steps between 0 and {high} (a smoothed edge? a value for 'ignore'?); make it two-valued"
        )
    return values != 0


def mask_of_picture(picture: Image.Image) -> np.ndarray:
    """A picture of labels (grey, palette or colour; black is outside) or with transparency -> (height, width) bool.

    Raises:
        ValueError: for pictures whose meaning cannot be told: grey steps, two ways to say what is inside.
    """
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"it is {picture.width} x {picture.height} pixels; more than {MAX_PIXELS} are not read")
    is_lossy = picture.format in _LOSSY
    has_alpha = "transparency" in picture.info or picture.mode.lower() in ("la", "pa", "rgba")
    if picture.mode == "P":
        return _mask_of_palette(picture)
    if not has_alpha and (picture.mode in ("1", "L", "I", "F") or picture.mode.startswith("I;16")):
        values = np.asarray(picture)
    else:
        colour = np.asarray(picture.convert("RGBA"))
        values = _visible(colour[..., :3].max(2), colour[..., 3])
    return _mask_of_lossy(values) if is_lossy else mask_of_values(values)


def _mask_of_lossy(values: np.ndarray) -> np.ndarray:
    """JPEG and its like blur 0 and 255, but not beyond telling; smaller labels drown, some without a trace."""
    if values.max() < _BRIGHT or ((values > _DARK) & (values < _BRIGHT)).any():
        raise ValueError("it was stored with loss (JPEG?), and its values can no longer be told apart; give a PNG")
    return values >= _BRIGHT


def _mask_of_palette(picture: Image.Image) -> np.ndarray:
    labels, colour = np.asarray(picture), np.asarray(picture.convert("RGBA"))
    is_seen = (colour[..., :3].max(2) > 0) & (colour[..., 3] > 0)
    if not np.array_equal(labels != 0, is_seen):
        raise ValueError("its palette does not show label 0 as black and all others in colour; save it in grey")
    return mask_of_values(labels)


def _visible(brightness: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Which of the two, uint8 (height, width), says what is inside."""
    if alpha.min() == alpha.max() > 0:
        return brightness
    seen = brightness[alpha > 0]
    if not seen.size:
        raise ValueError("it is transparent everywhere; save it in grey")
    if seen.min() < seen.max() and not seen.min():  # black and other colours where something is seen
        raise ValueError("both its colours and its transparency could say what is inside; save it in grey")
    return alpha


def _read_mask(path: str | os.PathLike) -> np.ndarray:
    if os.fspath(path).lower().endswith((".npy", ".npz")):
        try:
            return mask_of_values(read_array(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit of `mask_of_picture` is near
            with Image.open(path) as picture:
                return mask_of_picture(picture)
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(reason if os.fspath(path) in reason else f"{path}: {reason}") from None


def plane_of(rows: Sequence) -> np.ndarray | None:
    """Rows of numbers as an array where they can be nothing but a mask: all as long, and 0 to 1 or of two values."""
    if not all(isinstance(row, (list, tuple, np.ndarray)) for row in rows) or len({len(row) for row in rows}) != 1:
        return None
    values = np.asarray(rows)
    if values.ndim != 2 or values.size == 0 or values.dtype.kind not in "biuf":
        return None
    within = values.dtype.kind == "b" or bool(((values >= 0) & (values <= 1)).all())
    return values if within or (len(rows) > 2 and ((values == 0) | (values == values.max())).all()) else None


def as_polygons(rows: Sequence) -> list[list[float]]:
    """COCO's polygons, one [x0, y0, x1, y1, ...] or a list of them, as lists of floats.

    Raises:
        ValueError: for anything else.
    """
    rows = [rows] if rows and not isinstance(rows[0], (list, tuple, np.ndarray)) else rows
    try:
        return [[float(number) for number in row] for row in rows]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"these are neither rows of numbers nor polygons: {str(rows)[:60]}") from None


def _mask_of_rows(rows: Sequence, size: tuple[int, int] | None) -> np.ndarray:
    polygons = as_polygons(rows)
    if plane_of(polygons) is not None or (len(polygons), *{len(row) for row in polygons}) == size:
        return mask_of_values(np.asarray(rows) if np.ndim(rows) == 2 else np.asarray(polygons))
    if size is None:
        raise ValueError("these are polygons, whose size is not known here; give run lengths or a picture")
    return draw_polygons(polygons, *size)


def draw_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """What lies inside of at least one polygon, pixel for pixel as pycocotools draws it.

    Args:
        polygons: [x0, y0, x1, y1, ...] each, in pixels. Those of fewer than three points, of which data sets hold a
            few, are left out.

    Returns:
        (height, width) bool.

    Raises:
        ValueError: for a polygon with half a point or far outside of the picture.
        EmptyMask: where no pixel is inside.
    """
    mask = np.zeros(height * width + 1, bool)
    for polygon in polygons:
        corners = np.asarray(polygon, np.float64)
        if corners.size % 2:
            raise ValueError(f"a polygon has {corners.size} numbers; it is x0, y0, x1, y1, ... in pixels")
        wrong = corners[~(np.abs(corners) <= _REACH * max(height, width))]
        if wrong.size:
            raise ValueError(f"a corner of its polygons lies at {wrong[0]:g}, far outside of the picture")
        if corners.size >= 6:
            mask |= _inside(corners.reshape(-1, 2), height, width)
    if not mask.any():
        raise EmptyMask("its polygons hold no pixel of the picture; they are x0, y0, x1, y1, ... in pixels")
    return mask[:-1].reshape(height, width, order="F")


def _inside(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height * width + 1,) bool down the columns; the steps of `rleFrPoly` in pycocotools' maskApi.c."""
    points = np.trunc(_UPSAMPLED * corners + 0.5).astype(np.int64)
    outline = np.concatenate([_line(a, b) for a, b in zip(points, np.roll(points, -1, axis=0), strict=True)])
    before, after = outline[:-1], outline[1:]
    moved = before[:, 0] != after[:, 0]
    before, after = before[moved], after[moved]
    x = (np.where(after[:, 0] < before[:, 0], after[:, 0], after[:, 0] - 1) + 0.5) / _UPSAMPLED - 0.5
    y = (np.minimum(before[:, 1], after[:, 1]) + 0.5) / _UPSAMPLED - 0.5
    kept = (np.floor(x) == x) & (x >= 0) & (x <= width - 1)
    crossings = x[kept].astype(np.int64) * height + np.ceil(np.clip(y[kept], 0, height)).astype(np.int64)
    return np.cumsum(np.bincount(crossings, minlength=height * width + 1)) % 2 == 1


def _line(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The points from one corner to the next, (n, 2), one for each step of the longer side."""
    steps = np.abs(end - start)
    length, along = int(steps.max()), int(steps[1] > steps[0])
    is_flipped = start[along] > end[along]
    first, last = (end, start) if is_flipped else (start, end)
    t = np.arange(length + 1)
    points = np.empty((length + 1, 2), np.int64)
    points[:, along] = first[along] + t
    slope = (last[1 - along] - first[1 - along]) / length if length else 0.0
    points[:, 1 - along] = np.trunc(first[1 - along] + slope * t + 0.5)
    return points[::-1] if is_flipped else points
