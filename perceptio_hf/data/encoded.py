"""Pictures, masks and depth maps in all the forms in which samples hold them."""

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from .depth_maps import DepthMap, depth_from_values, read_depth
from .run_length import decode_mask

_PLAIN_MODES = ("1", "L", "P", "I", "I;16", "F")  # one number per pixel, 0 outside of a mask


def as_list(value: Any) -> list:
    """The items in the value of `images`, `masks`, `depth` or `depth_valid`: none, one, or a list of them."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) and not _is_plane(value) else [value]


def _is_plane(value: Sequence) -> bool:
    """Whether nested lists are one mask or depth map: rows of numbers."""
    row = value[0] if value else None
    return isinstance(row, (list, tuple)) and bool(row) and not isinstance(row[0], (list, tuple))


def as_code_lists(value: Any) -> list[list[int]]:
    """The spans in the value of `depth_codes`: none, one, or a list of them."""
    rows = (
        []
        if value is None
        else [item.tolist() if isinstance(item, (np.ndarray, np.integer)) else item for item in value]
    )
    if not rows:
        return []
    return [list(row) for row in rows] if isinstance(rows[0], (list, tuple)) else [rows]


def open_encoded(source: Any) -> Any:
    """Encoded bytes, alone or as `datasets` keeps them ({"bytes": ..., "path": ...}), become what they encode: a
    picture, or the array of a .npy file. Other sources stay as they are."""
    path = None
    if isinstance(source, Mapping):
        data, path = source.get("bytes"), source.get("path")
        source = path if data is None else data
    if not isinstance(source, bytes):
        return source
    try:
        is_array = source.startswith(b"\x93NUMPY")
        return np.load(io.BytesIO(source), allow_pickle=False) if is_array else Image.open(io.BytesIO(source))
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"The {len(source)} bytes of picture {path or ''} cannot be read ({reason}).") from None


def load_mask(source: Any) -> np.ndarray:
    """A mask in any of its forms (see `Sample`) -> (H, W) bool.

    Raises:
        ValueError: for what is no mask.
    """
    if isinstance(source, Mapping) and source.get("counts") is not None:
        return decode_mask(source)
    source = open_encoded(source)
    try:
        source = Image.open(source) if isinstance(source, (str, os.PathLike)) else source
        if isinstance(source, Image.Image) and source.mode not in _PLAIN_MODES:
            source = source.convert("L")
        mask = np.asarray(source)
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ValueError(" ".join(str(error).split())[:200]) from None
    if mask.ndim != 2 or mask.dtype.kind not in "biuf":
        raise ValueError(f"a mask is (height, width) numbers, not {mask.dtype} of shape {mask.shape}.")
    return mask.astype(bool)


def load_depth(source: Any, unit: str, valid: np.ndarray | None = None) -> DepthMap:
    """A depth map in any of its forms; `unit` and `valid` as in `perceptio_hf.data.depth_maps.read_depth`.

    Raises:
        ValueError: for what is no depth map, or one without a valid pixel.
    """
    source = open_encoded(source)
    if isinstance(source, (str, os.PathLike)):
        return read_depth(source, unit, valid)
    return depth_from_values(source, unit, valid)
