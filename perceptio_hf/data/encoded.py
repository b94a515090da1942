"""Pictures, masks and depth maps in all the forms in which samples hold them."""

import base64
import io
import os
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from .arrays import NPY_MAGIC, ZIP_MAGIC, read_array
from .depth_maps import DepthMap, depth_from_values, read_depth
from .masks import mask_of


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
    """Encoded bytes, alone, in a data: URL or as `datasets` keeps them ({"bytes": ..., "path": ...}), become what they
    encode: a picture, or the array of a .npy or .npz file. Other sources stay as they are."""
    path = None
    if isinstance(source, Mapping):
        data, path = source.get("bytes"), source.get("path")
        source = path if data is None else data
    source = local(source)
    if not isinstance(source, bytes):
        return source
    try:
        is_array = source.startswith((NPY_MAGIC, ZIP_MAGIC))
        return read_array(source) if is_array else Image.open(io.BytesIO(source))
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"The {len(source)} bytes of picture {path or ''} cannot be read ({reason}).") from None


def local(source: Any) -> Any:
    """The bytes of a data: URL, the path of a file: URL; anything else as it is.

    Raises:
        ValueError: for a data: URL that cannot be decoded.
    """
    if not isinstance(source, str):
        return source
    scheme = source[:8].lower()
    if scheme.startswith("file://"):
        return urllib.request.url2pathname(urllib.parse.urlsplit(source).path)
    if not scheme.startswith("data:"):
        return source
    kind, comma, data = source.partition(",")
    try:
        if not comma:
            raise ValueError("it has no comma")
        if not kind.lower().endswith(";base64"):
            return urllib.parse.unquote_to_bytes(data)
        return base64.b64decode("".join(urllib.parse.unquote(data).split()), validate=True)
    except ValueError as error:
        raise ValueError(f"The URL {source[:40]}... is no data: URL ({error}).") from None


def load_mask(source: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    """A mask in any of its forms (see `Sample`) -> (H, W) bool.

    Args:
        size: (H, W) of its picture, which tells rows of numbers from polygons.

    Raises:
        ValueError: for what is no mask, or could be one in two ways.
    """
    is_file = not isinstance(source, Mapping) or source.get("bytes") is not None or source.get("path") is not None
    return mask_of(open_encoded(source) if is_file else source, size)


def load_depth(source: Any, unit: str, valid: np.ndarray | None = None) -> DepthMap:
    """A depth map in any of its forms; `unit` and `valid` as in `perceptio_hf.data.depth_maps.read_depth`.

    Raises:
        ValueError: for what is no depth map, or one without a valid pixel.
    """
    source = open_encoded(source)
    if isinstance(source, (str, os.PathLike)):
        return read_depth(source, unit, valid)
    return depth_from_values(source, unit, valid)
