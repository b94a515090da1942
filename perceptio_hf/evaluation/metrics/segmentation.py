"""How well masks fit what an expression refers to: cIoU, gIoU, precision, and expressions that refer to nothing.

Masks are compared as the run lengths they come in, never as pictures: a pair takes time and memory by its number of
runs (a few hundred), whatever the size of the picture.

An expression may have no target (gRefCOCO); its reference is empty. These samples are counted as the evaluation
published with gRefCOCO does (Liu, Ding, Jiang 2023, "GRES: Generalized Referring Expression Segmentation").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perceptio_hf.data.run_length import RunLengths, read_counts

PRECISION_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class MaskAreas:
    """Pixels of n pairs of masks: common to both, of the prediction, of the reference; each (n,) int64."""

    common: np.ndarray
    predicted: np.ndarray
    referred: np.ndarray

    @property
    def union(self) -> np.ndarray:
        return self.predicted + self.referred - self.common

    @property
    def iou(self) -> np.ndarray:
        """(n,) float64 in [0, 1]; 1 where both masks are empty."""
        return np.divide(self.common, self.union, out=np.ones(len(self.common)), where=self.union > 0)


def referring_segmentation(
    predictions: Sequence[RunLengths], references: Sequence[RunLengths], *, min_pixels: int = 0
) -> dict[str, float | int | None]:
    """Score masks against what the expressions refer to.

    Args:
        predictions, references: One mask per expression as COCO run lengths, compressed or not; a pair of one size.
            Several masks of one answer are merged by the caller.
        min_pixels: A prediction with fewer pixels counts as empty.

    Returns:
        "ciou": all common pixels over all pixels of the unions; 1 if there are none (all empty, all right).
        "giou": the mean IoU; a pair of empty masks has IoU 1, a pair with one empty mask 0.
        "precision@0.5" .. "precision@0.9": share of the expressions with a target whose IoU is at least that; None
            without such expressions.
        "no_target_accuracy": share of the expressions without a target that got an empty mask; None without such.
        "target_accuracy": share of the expressions with a target that got a mask with a pixel; None without such.
        "samples", "no_target_samples": how many.

    Raises:
        ValueError: no samples, lists of two lengths, masks of two sizes, or run lengths that do not fill their size;
            the sample is named, counted from 0.
    """
    return segmentation_scores(mask_areas(predictions, references), min_pixels=min_pixels)


def mask_areas(predictions: Sequence[RunLengths], references: Sequence[RunLengths]) -> MaskAreas:
    """Count the pixels of pairs of masks; errors as in `referring_segmentation`."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions do not pair with {len(references)} references.")
    areas = np.zeros((len(predictions), 3), dtype=np.int64)
    for sample, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        try:
            areas[sample] = _pair_areas(prediction, reference)
        except ValueError as error:
            raise ValueError(f"sample {sample}: {error}") from None
    return MaskAreas(*areas.T)


def segmentation_scores(areas: MaskAreas, *, min_pixels: int = 0) -> dict[str, float | int | None]:
    """The scores of `referring_segmentation` from counted pixels, e.g. of several shards put together."""
    if not len(areas.common):
        raise ValueError("there are no masks to score.")
    seen = areas.predicted >= max(min_pixels, 1)
    areas = MaskAreas(np.where(seen, areas.common, 0), np.where(seen, areas.predicted, 0), areas.referred)
    iou, union, target = areas.iou, int(areas.union.sum()), areas.referred > 0
    return {
        "ciou": int(areas.common.sum()) / union if union else 1.0,
        "giou": float(iou.mean()),
        **{f"precision@{threshold}": _share(iou[target] >= threshold) for threshold in PRECISION_THRESHOLDS},
        "no_target_accuracy": _share(~seen[~target]),
        "target_accuracy": _share(seen[target]),
        "samples": len(iou),
        "no_target_samples": int((~target).sum()),
    }


def _share(hits: np.ndarray) -> float | None:
    return float(hits.mean()) if hits.size else None


def _pair_areas(prediction: RunLengths, reference: RunLengths) -> tuple[int, int, int]:
    """(common, predicted, referred) pixels of two masks."""
    first, second = read_counts(prediction), read_counts(reference)
    if list(prediction["size"]) != list(reference["size"]):
        raise ValueError(
            f"the prediction is {_shape(prediction)} and the reference {_shape(reference)} (height x width); "
            f"resize the prediction to its picture's size."
        )
    return _common_pixels(np.cumsum(first), np.cumsum(second)), int(first[1::2].sum()), int(second[1::2].sum())


def _common_pixels(first: np.ndarray, second: np.ndarray) -> int:
    """Pixels inside both masks, from the places where their runs end."""
    cuts = np.sort(np.concatenate([first, second]), kind="stable")  # two sorted halves: one merge
    # Behind an odd number of ended runs lies a run of the mask.
    both = np.searchsorted(first, cuts[:-1], side="right") & np.searchsorted(second, cuts[:-1], side="right") & 1
    return int(np.diff(cuts)[both == 1].sum())


def _shape(lengths: RunLengths) -> str:
    return " x ".join(str(side) for side in lengths["size"])
