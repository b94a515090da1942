"""Our COCO run lengths are pycocotools' own, and come back as the mask they were."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceptio_hf.data.run_length import compress_counts, decode_mask, encode_mask, read_counts


@st.composite
def masks(draw) -> np.ndarray:
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    share, seed = draw(st.floats(0, 1)), draw(st.integers(0, 2**32 - 1))
    mask = np.random.default_rng(seed).random((height, width)) < share
    return mask.repeat(draw(st.integers(1, 30)), axis=0)  # repeats make long runs, so numbers of several digits


@settings(deadline=None)
@given(masks())
def test_round_trip(mask):
    assert np.array_equal(decode_mask(encode_mask(mask)), mask)


@settings(deadline=None)
@given(masks())
def test_same_as_pycocotools(mask):
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools comes with the extra dev or eval")
    theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    ours = encode_mask(mask)
    assert ours["counts"] == theirs["counts"].decode() and ours["size"] == list(theirs["size"])
    assert np.array_equal(coco.decode({"size": ours["size"], "counts": ours["counts"].encode()}), mask)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**31 - 1), max_size=30))
def test_numbers_of_every_length_can_be_read(counts):
    text, size = compress_counts(counts), [1, sum(counts)]
    for written in (text, text.encode(), counts, np.array(counts, dtype=np.uint32)):
        assert read_counts({"size": size, "counts": written}).tolist() == counts


def test_what_is_no_mask_is_refused():
    with pytest.raises(ValueError, match="one by one"):
        encode_mask(np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match="3 x 4 has 12"):
        decode_mask({"size": [3, 4], "counts": encode_mask(np.zeros((2, 4)))["counts"]})
    with pytest.raises(ValueError, match="does not occur"):
        decode_mask({"size": [1, 1], "counts": "\n"})


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"size": [1, 1], "counts": "P"}, "break off"),  # announces a second character
        ({"size": [1, 1], "counts": "PPPPPPPP0"}, "beyond 32 bits"),
        ({"size": [1, 1], "counts": [0.5, 0.5]}, "whole numbers"),
        ({"size": [1, 1], "counts": [[1]]}, "whole numbers"),
        ({"size": [1, 1], "counts": 1}, "whole numbers"),
        ({"size": [1, 1], "counts": [2, -1]}, "cover 1 pixels"),
        ({"size": [1, 1], "counts": ""}, "cover 0 pixels"),
        ({"size": [1], "counts": [1]}, "Run lengths are"),
        ({"counts": [1]}, "Run lengths are"),
        (None, "Run lengths are"),
    ],
)
def test_broken_run_lengths(lengths, message):
    with pytest.raises(ValueError, match=message):
        read_counts(lengths)
