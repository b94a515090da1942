"""The objectives of Perceptio: pure functions, each a sum over its items divided by a count that can be given.

Words are in `loss_tokens`, depth and masks in `loss_pictures`, counts in `loss_labels`; this file adds them up and is
the place to import all of them from.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perceptio_hf.tokens import SpatialVocabulary

from .labels import LabelLayout, LossCounts
from .pictures import mask_loss, reconstruction_loss, score_loss, soft_merge
from .words import (
    SupervisedTokens,
    mean_of,
    supervised_tokens,
)

if TYPE_CHECKING:
    from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE

PARTS = ("text", "marker", "token", "count", "reconstruction", "mask_bce", "mask_dice", "mask_score")


@dataclass(frozen=True)
class LossWeights:
    """Weights of the parts of `composite_loss`; those of the masks are Sa2VA's, the others ours.

    A part of weight 0 is reported but not added. Only `reconstruction` costs something by itself: with weight 0 it is
    neither computed nor reported.

    Args:
        count_beta: relative error up to which the count loss is a parabola, above 0, see `count_loss`.
        gradient: of the gradient-matching term inside the reconstruction.
        temperature: of soft-merge, above 0.

    Raises:
        ValueError: if a weight is negative or not finite, all parts have weight 0, or `count_beta` or the temperature
            is not above 0.
    """

    text: float = 1.0
    marker: float = 1.0
    token: float = 1.0
    count: float = 1.0
    count_beta: float = 1.0
    reconstruction: float = 1.0
    gradient: float = 0.5
    mask_bce: float = 2.0
    mask_dice: float = 0.5
    mask_score: float = 0.1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"The loss weight {item.name} is {value}; expected a finite number of 0 or more.")
        if self.count_beta == 0:
            raise ValueError("A count_beta of 0 leaves the count loss without a slope at 0; choose 0.001, say.")
        if self.temperature == 0:
            raise ValueError("A temperature of 0 passes no gradient; choose a small one, such as 0.1.")
        if not any(getattr(self, part) for part in PARTS):
            raise ValueError(f"All loss weights are 0, so nothing would be learnt; give one of {', '.join(PARTS)}.")


def composite_loss(
    hidden_states: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    labels: Tensor,
    vocabulary: SpatialVocabulary,
    *,
    codec: "DepthVQVAE | None" = None,
    depth: Tensor | None = None,
    depth_valid: Tensor | None = None,
    mask_logits: Tensor | None = None,
    mask_targets: Tensor | None = None,
    mask_scores: Tensor | None = None,
    weights: LossWeights | None = None,
    counts: LossCounts | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """All objectives of a batch with s depth spans and m [SEG] tokens, both in reading order (row by row).

    Logits of the full vocabulary are computed once and only where there is a label. Values that are not finite are
    never hidden: they show in the part they come from.

    Args:
        hidden_states: (b, L, d) after the final norm.
        lm_head: (n, d) -> (n, V), called once.
        labels: (b, L) as in transformers, -100 where nothing is learnt; shifted in here.
        codec, depth, depth_valid: the depth codec and the true relative inverse depth (s, H, W) in [0, 1] with its
            valid pixels (s, H, W), None if all are valid. Without codec and depth there is no reconstruction.
        mask_logits, mask_targets, mask_scores: (m, h, w), (m, h, w) in [0, 1], and (m,) predicted IoU. Without the
            first two there is no mask loss, without the last no loss of the scores.
        weights: None takes the defaults.
        counts: what the parts are divided by, those of all micro batches of a step; None: of this batch.

    Returns:
        The weighted sum and its parts, of `PARTS`: text, marker, token and count always, the others as said above. All
        are scalars with a graph, zero where the batch has nothing for them.

    Raises:
        ValueError: where labels, depth and masks contradict one another (rows are named), shapes differ, or `counts`
            are 0 for something that the batch holds.
    """
    weights = LossWeights() if weights is None else weights
    tokens = supervised_tokens(hidden_states, lm_head, labels, vocabulary)
    has_depth = _spans_with_depth(tokens.layout, depth, depth_valid)
    own = tokens.layout.counts(has_depth)
    counts = own if counts is None else _covering(counts, own)
    parts = {
        "text": mean_of(tokens.text_sum(), counts.text),
        "marker": mean_of(tokens.marker_sum(), counts.markers),
        "token": mean_of(tokens.token_sum(), counts.codes),
        "count": mean_of(tokens.count_sum(weights.count_beta), counts.responses),
    }
    if codec is not None and depth is not None and weights.reconstruction:
        code_logits = tokens.span_logits(vocabulary.num_depth_tokens)
        parts["reconstruction"] = _reconstruction(
            code_logits, codec, depth, depth_valid, has_depth, weights, counts.spans
        )
    parts |= _mask_parts(tokens, mask_logits, mask_targets, mask_scores, counts.masks)
    total = hidden_states[:0].sum()  # a zero with a graph, should no part have a weight
    for name, part in parts.items():
        if weight := getattr(weights, name):
            total = total + weight * part.to(total.device)
    return total, parts


def _covering(counts: LossCounts, own: LossCounts) -> LossCounts:
    for item in fields(LossCounts):
        here, given = getattr(own, item.name), getattr(counts, item.name)
        if not math.isfinite(given) or (here and given <= 0):
            raise ValueError(
                f"`counts` says {given} {item.name}, but this batch alone has {here}; give the counts of all micro "
                "batches of the step, this one among them."
            )
    return counts


def _spans_with_depth(layout: LabelLayout, depth: Tensor | None, valid: Tensor | None) -> Tensor:
    """Spans whose depth has a valid pixel: (s,) bool on the labels' device, (0,) without depth."""
    for name, maps in (("depth", depth), ("depth_valid", valid)):
        if maps is not None:
            layout.check_spans(len(maps), name)
    if valid is None:
        return layout.rows.new_ones(0 if depth is None else len(depth), dtype=torch.bool)
    if depth is None or depth.shape != valid.shape:
        shape = None if depth is None else tuple(depth.shape)
        raise ValueError(f"`depth_valid` has shape {tuple(valid.shape)}, `depth` {shape}; give both the same shape.")
    return valid.bool().flatten(1).any(1).to(layout.rows.device)


def _reconstruction(
    code_logits: Tensor,
    codec: "DepthVQVAE",
    depth: Tensor,
    valid: Tensor | None,
    has_depth: Tensor,
    weights: LossWeights,
    count: float,
) -> Tensor:
    """Soft-merge the spans whose depth is known, (s, N, K) logits, and compare."""
    depth = depth.to(code_logits.device)
    valid = torch.ones_like(depth, dtype=torch.bool) if valid is None else valid.to(depth.device)
    code_logits, depth, valid = code_logits[has_depth], depth[has_depth], valid[has_depth]
    if not len(depth):
        return code_logits[:0].sum()
    own_size, size = (codec.config.image_size,) * 2, tuple(depth.shape[1:])
    merged = soft_merge(code_logits, codec, temperature=weights.temperature, size=None if size == own_size else size)
    return reconstruction_loss(merged, depth, valid, gradient_weight=weights.gradient, count=count)


def _mask_parts(
    tokens: SupervisedTokens,
    logits: Tensor | None,
    targets: Tensor | None,
    scores: Tensor | None,
    count: float,
) -> dict[str, Tensor]:
    if targets is not None:
        tokens.layout.check_masks(len(targets), "mask_targets")
    if logits is None and (targets is None or not len(targets)):
        return {}
    if logits is None or targets is None:
        missing = "mask_logits" if logits is None else "mask_targets"
        raise ValueError(f"`{missing}` is missing; give both logits and targets of the masks, or neither.")
    tokens.layout.check_masks(len(logits), "mask_logits")
    targets = targets.to(logits.device)
    _, parts = mask_loss(logits, targets, count=count)
    if scores is not None:
        tokens.layout.check_masks(len(scores), "mask_scores")
        parts["mask_score"] = score_loss(scores, logits, targets, count=count)
    return parts
