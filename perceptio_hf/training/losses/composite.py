"""The sum of all parts of the objective, and their weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perceptio_hf.tokens import SpatialVocabulary

from .labels import LabelLayout, LossCounts
from .parts import PARTS, LossBatch
from .words import SupervisedTokens, check_over, supervised_tokens

if TYPE_CHECKING:
    from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE

_PartWeights = make_dataclass(
    "_PartWeights", [(part.name, float, field(default=part.weight)) for part in PARTS.values()], frozen=True
)


@dataclass(frozen=True)
class LossWeights(_PartWeights):
    """Weights of the parts of `composite_loss`, one field for each of `PARTS`, and what some parts depend on.

    A part of weight 0 is reported but not added. Only `reconstruction` costs something by itself: with weight 0 it is
    neither computed nor reported.

    Args:
        token_over: what the token loss is taken over, see `token_loss`.
        count_beta: relative error up to which the count loss is a parabola, above 0, see `count_loss`.
        gradient: of the gradient-matching term inside the reconstruction.
        temperature: of soft-merge, above 0.

    Raises:
        ValueError: if a weight is negative or not finite, all parts have weight 0, `token_over` is unknown, or
            `count_beta` or the temperature is not above 0.
    """

    token_over: str = "codes"
    count_beta: float = 1.0
    gradient: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_over(self.token_over)
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "token_over" and not (math.isfinite(value) and value >= 0):
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
    layout: LabelLayout | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """All objectives of a batch with s depth spans and m [SEG] tokens, both in reading order (row by row).

    Logits of the full vocabulary are computed only where there is a label, and a part of them at a time. Values that
    are not finite are never hidden: they show in the part they come from.

    Args:
        hidden_states: (b, L, d) after the final norm.
        lm_head: (n, d) -> (n, V), called once; see `read_head`.
        labels: (b, L) as in transformers, -100 where nothing is learnt; shifted in here.
        codec, depth, depth_valid: the depth codec and the true relative inverse depth (s, H, W) in [0, 1] with its
            valid pixels (s, H, W), None if all are valid. Without codec and depth there is no reconstruction.
        mask_logits, mask_targets, mask_scores: (m, h, w), (m, h, w) in [0, 1], and (m,) predicted IoU. Without the
            first two there is no mask loss, without the last no loss of the scores.
        weights: None takes the defaults.
        counts: what the parts are divided by, those of all micro batches of a step; None: of this batch.
        layout: `read_labels` of these labels, where they have been read already.

    Returns:
        The weighted sum and its parts, of `PARTS`: text, marker, token and count always, the others as said above. All
        are scalars with a graph, zero where the batch has nothing for them.

    Raises:
        ValueError: where labels, depth and masks contradict one another (rows are named), shapes differ, or `counts`
            are 0 for something that the batch holds.
    """
    weights = LossWeights() if weights is None else weights
    tokens = supervised_tokens(hidden_states, lm_head, labels, vocabulary, layout=layout)
    has_depth = _spans_with_depth(tokens.layout, depth, depth_valid)
    own = tokens.layout.counts(has_depth)
    counts = own if counts is None else _covering(counts, own)
    if mask_targets is None and mask_logits is not None and not len(mask_logits):
        mask_logits = None  # a batch without masks
    _check_masks(tokens, mask_logits, mask_targets, mask_scores)
    batch = LossBatch(
        tokens=tokens,
        counts=counts,
        weights=weights,
        num_depth_tokens=vocabulary.num_depth_tokens,
        codec=codec,
        depth=depth,
        depth_valid=depth_valid,
        has_depth=has_depth,
        mask_logits=mask_logits,
        mask_targets=None if mask_logits is None else mask_targets.to(mask_logits.device),
        mask_scores=mask_scores,
    )
    parts = {}
    for part in PARTS.values():
        wanted = getattr(weights, part.name) or not part.optional
        if wanted and (value := part.compute(batch)) is not None:
            parts[part.name] = value
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


def _check_masks(
    tokens: SupervisedTokens, logits: Tensor | None, targets: Tensor | None, scores: Tensor | None
) -> None:
    if targets is not None:
        tokens.layout.check_masks(len(targets), "mask_targets")
    if logits is None and (targets is None or not len(targets)):
        return
    if logits is None or targets is None:
        missing = "mask_logits" if logits is None else "mask_targets"
        raise ValueError(f"`{missing}` is missing; give both logits and targets of the masks, or neither.")
    tokens.layout.check_masks(len(logits), "mask_logits")
    if scores is not None:
        tokens.layout.check_masks(len(scores), "mask_scores")
