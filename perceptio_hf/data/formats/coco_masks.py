"""Segmentations in COCO's forms -> run lengths at the size of their picture."""

from collections.abc import Mapping
from typing import Any

from perceptio_hf.data.run_length import RunLengths, compress_counts, read_counts
from perceptio_hf.extras import missing

_REACH = 10  # sides of the picture; drawing a polygon takes memory by its length


def segmentation_mask(segmentation: Any, height: int, width: int) -> RunLengths:
    """One object's mask.

    Args:
        segmentation: polygons [[x0, y0, x1, y1, ...], ...] or a single one, in pixels, whose union it is; or run
            lengths {"size": [height, width], "counts": ...}, compressed or not.
        height, width: of the picture.

    Raises:
        ValueError: for none of these forms, run lengths of another size, or a mask without a pixel.
        ImportError: where polygons are met and pycocotools is not installed.
    """
    mask = (
        _checked_lengths(segmentation, height, width)
        if isinstance(segmentation, Mapping)
        else _rasterised(_polygons(segmentation, _REACH * max(height, width)), height, width)
    )
    if not read_counts(mask)[1::2].any():
        raise ValueError("its mask has no pixel.")
    return mask


def _checked_lengths(lengths: Mapping, height: int, width: int) -> RunLengths:
    counts = read_counts(lengths)
    size = [int(side) for side in lengths["size"]]
    if size != [height, width]:
        raise ValueError(
            f"its run lengths are {size[0]} x {size[1]} and its picture {height} x {width} (height x width); the "
            "annotations belong to another version of the pictures."
        )
    return RunLengths(size=size, counts=compress_counts(counts.tolist()))


def _polygons(segmentation: Any, reach: float) -> list[list[float]]:
    """Those with three points at least; data sets hold a few that are none. No corner lies farther off than `reach`."""
    items = list(segmentation) if isinstance(segmentation, (list, tuple)) else []
    items = [items] if items and not isinstance(items[0], (list, tuple)) else items
    polygons = [[float(number) for number in item] for item in items if len(item) >= 6 and len(item) % 2 == 0]
    if not polygons:
        raise ValueError(f"its segmentation is neither polygons nor run lengths: {segmentation!r:.60}.")
    wrong = [number for item in polygons for number in item if not abs(number) <= reach]
    if wrong:
        raise ValueError(f"a corner of its polygons lies at {wrong[0]:g}, far outside of the picture.")
    return polygons


def _rasterised(polygons: list[list[float]], height: int, width: int) -> RunLengths:
    """By pycocotools, whose rule for the pixels on an edge is part of the published scores."""
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise missing(error, "Drawing polygons") from error
    merged = coco.merge(coco.frPyObjects(polygons, height, width))
    return RunLengths(size=[height, width], counts=merged["counts"].decode("ascii"))
