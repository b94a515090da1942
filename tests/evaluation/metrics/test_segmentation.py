"""Scores of masks against pycocotools, plain pixel counts, and cases worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceptio_hf.data.run_length import encode_mask, read_counts
from perceptio_hf.evaluation.metrics.segmentation import (
    PRECISION_THRESHOLDS,
    MaskAreas,
    mask_areas,
    referring_segmentation,
    segmentation_scores,
)


@st.composite
def mask_pairs(draw) -> tuple[np.ndarray, np.ndarray]:
    """Two masks of one odd size, often empty or full, with runs of every length."""
    height, width, seed = draw(st.integers(1, 23)), draw(st.integers(1, 23)), draw(st.integers(0, 2**32 - 1))
    rng, shares = np.random.default_rng(seed), draw(st.tuples(*[st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])] * 2))
    return tuple((rng.random((height, width)) < share).repeat(draw(st.integers(1, 3)), 0) for share in shares)


def same_height(pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    height = min(len(mask) for mask in pair)
    return pair[0][:height], pair[1][:height]


def uncompressed(mask: np.ndarray) -> dict:
    lengths = encode_mask(mask)
    return {"size": lengths["size"], "counts": read_counts(lengths).tolist()}


@settings(deadline=None)
@given(st.lists(mask_pairs().map(same_height), min_size=1, max_size=5))
def test_areas_are_counted_pixels(pairs):
    areas = mask_areas([encode_mask(first) for first, _ in pairs], [uncompressed(second) for _, second in pairs])
    assert areas.common.tolist() == [int((first & second).sum()) for first, second in pairs]
    assert areas.union.tolist() == [int((first | second).sum()) for first, second in pairs]
    assert areas.predicted.tolist() == [int(first.sum()) for first, _ in pairs]


@settings(deadline=None)
@given(mask_pairs().map(same_height))
def test_iou_is_that_of_pycocotools(pair):
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools comes with the extra dev or eval")
    first, second = (coco.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in pair)
    iou = mask_areas([first], [second]).iou[0]
    if pair[0].any() or pair[1].any():
        assert iou == pytest.approx(coco.iou([first], [second], [0])[0, 0])
    else:
        assert iou == 1.0  # pycocotools has 0 / 0 here


def box(left: int, right: int) -> dict:
    """A mask of 2 x 10 pixels that covers columns `left` to `right`."""
    mask = np.zeros((2, 10), dtype=bool)
    mask[:, left:right] = True
    return encode_mask(mask)


def test_hand_computed_scores():
    predictions = [box(0, 8), box(0, 2), box(0, 0), box(0, 3), box(4, 4)]
    references = [box(0, 10), box(1, 3), box(0, 5), box(0, 0), box(0, 0)]
    scores = referring_segmentation(predictions, references)
    # IoU: 16/20, 2/6, 0/10; without a target: 0 (with 6 pixels of union) and 1
    assert scores["ciou"] == pytest.approx((16 + 2) / (20 + 6 + 10 + 6))
    assert scores["giou"] == pytest.approx((0.8 + 1 / 3 + 0 + 0 + 1) / 5)
    precision = [scores[f"precision@{threshold}"] for threshold in PRECISION_THRESHOLDS]
    assert precision == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1 / 3, 0])  # 0.8 itself counts at 0.8
    assert scores["no_target_accuracy"] == 0.5 and scores["target_accuracy"] == pytest.approx(2 / 3)
    assert scores["samples"] == 5 and scores["no_target_samples"] == 2


def test_small_predictions_may_count_as_empty():
    scores = referring_segmentation([box(0, 1), box(0, 1)], [box(0, 0), box(0, 1)], min_pixels=3)
    assert scores["no_target_accuracy"] == 1.0 and scores["giou"] == 0.5 and scores["ciou"] == 0.0
    assert referring_segmentation([box(0, 1)], [box(0, 1)], min_pixels=2)["ciou"] == 1.0


def test_what_has_no_samples_is_none():
    with_targets = referring_segmentation([box(0, 1)], [box(0, 1)])
    assert with_targets["no_target_accuracy"] is None and with_targets["precision@0.9"] == 1.0
    without = referring_segmentation([box(0, 0)], [box(0, 0)])
    assert without["precision@0.5"] is None and without["target_accuracy"] is None
    assert without["ciou"] == without["giou"] == without["no_target_accuracy"] == 1.0


def test_shards_put_together_score_as_one():
    predictions, references = [box(0, k) for k in range(8)], [box(k // 2, 8) for k in range(8)]
    halves = [mask_areas(predictions[part], references[part]) for part in (slice(0, 3), slice(3, 8))]
    both = MaskAreas(
        *(np.concatenate([getattr(half, name) for half in halves]) for name in ("common", "predicted", "referred"))
    )
    assert segmentation_scores(both) == referring_segmentation(predictions, references)


def test_bad_masks_are_named():
    good = box(0, 3)
    with pytest.raises(ValueError, match="no masks"):
        referring_segmentation([], [])
    with pytest.raises(ValueError, match="2 predictions do not pair with 1"):
        referring_segmentation([good, good], [good])
    with pytest.raises(ValueError, match="sample 1: the prediction is 10 x 2 and the reference 2 x 10"):
        referring_segmentation([good, {**good, "size": [10, 2]}], [good, good])
    with pytest.raises(ValueError, match="sample 0: These runs cover 20 pixels; a mask of 3 x 10 has 30"):
        referring_segmentation([{**good, "size": [3, 10]}], [good])
    with pytest.raises(ValueError, match="sample 0: Run lengths are"):
        referring_segmentation([{"size": [2, 10]}], [good])
