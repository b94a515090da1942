"""Segmentations become the masks that pycocotools makes of them."""

import re
import sys

import numpy as np
import pytest
from evaluation.published_formats import column_runs
from hypothesis import given, settings
from hypothesis import strategies as st

from perceptio_hf.data.formats.coco_masks import segmentation_mask
from perceptio_hf.data.run_length import decode_mask, encode_mask
from perceptio_hf.extras import how_to_install

coco = pytest.importorskip("pycocotools.mask")

HEIGHT, WIDTH = 23, 31
corner = st.tuples(st.floats(0, WIDTH), st.floats(0, HEIGHT))
polygon = st.lists(corner, min_size=3, max_size=8).map(lambda points: [side for point in points for side in point])


@settings(max_examples=60, deadline=None)
@given(st.lists(polygon, min_size=1, max_size=3))
def test_polygons_are_united(polygons):
    parts = [coco.decode(coco.frPyObjects([item], HEIGHT, WIDTH))[:, :, 0] for item in polygons]
    expected = np.any(parts, 0)
    if expected.any():
        assert (decode_mask(segmentation_mask(polygons, HEIGHT, WIDTH)) == expected).all()
    else:
        with pytest.raises(ValueError, match="no pixel"):
            segmentation_mask(polygons, HEIGHT, WIDTH)


def test_a_polygon_alone_and_polygons_that_are_none():
    square = [2.0, 3.0, 9.0, 3.0, 9.0, 12.0, 2.0, 12.0]
    expected = segmentation_mask([square], HEIGHT, WIDTH)
    assert decode_mask(expected).sum() == 63
    assert segmentation_mask(square, HEIGHT, WIDTH) == expected
    assert segmentation_mask([[1.0, 1.0, 2.0, 2.0], square, [5.0]], HEIGHT, WIDTH) == expected


def test_run_lengths_in_both_forms():
    mask = np.random.default_rng(0).random((HEIGHT, WIDTH)) > 0.6
    compressed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert segmentation_mask(compressed, HEIGHT, WIDTH) == encode_mask(mask)
    assert segmentation_mask(column_runs(mask), HEIGHT, WIDTH) == encode_mask(mask)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [WIDTH, HEIGHT], "counts": [0, HEIGHT * WIDTH]}, "31 x 23 and its picture 23 x 31"),
        ({"size": [HEIGHT, WIDTH], "counts": [5, 5]}, "cover 10 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}, "no pixel"),
        ([[1.0, 1.0, float("nan"), 1.0, 5.0, 9.0]], "a corner of its polygons lies at nan"),
        ([[1.0, 1.0, 1e12, 1.0, 5.0, 9.0]], r"a corner of its polygons lies at 1e\+12"),
        ([], "neither polygons nor run lengths"),
        ([[1.0, 2.0, 3.0, 4.0]], "neither polygons nor run lengths"),
        (None, "neither polygons nor run lengths"),
        ("abc", "neither polygons nor run lengths"),
    ],
)
def test_what_is_no_mask(segmentation, message):
    with pytest.raises(ValueError, match=message):
        segmentation_mask(segmentation, HEIGHT, WIDTH)


def test_without_pycocotools(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match=re.escape(f"needs the library pycocotools: {how_to_install('eval')}")):
        segmentation_mask([2.0, 3.0, 9.0, 3.0, 9.0, 12.0], HEIGHT, WIDTH)
    lengths = {"size": [2, 2], "counts": [1, 3]}
    assert decode_mask(segmentation_mask(lengths, 2, 2)).sum() == 3  # run lengths need nothing
