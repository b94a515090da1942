"""The parts of the composite loss: each one function, registered with all that has to be known about it.

A part that is registered here has its weight in `LossWeights` and in the trainer's configuration and recipes, its line
in the logs, its curve in `losses.png` and its row in the table of docs/training.md (`parts_table`). docs/extending.md
adds one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .labels import LossCounts
from .pictures import mask_loss, reconstruction_loss, score_loss, soft_merge
from .words import SupervisedTokens, mean_of

if TYPE_CHECKING:
    from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE

    from .composite import LossWeights


@dataclass(frozen=True)
class LossBatch:
    """What the parts of a batch with s depth spans and m [SEG] tokens are computed from; see `composite_loss`.

    Args:
        tokens: what the model predicts at the n learnt positions.
        counts: what sums are divided by, those of the whole step.
        num_depth_tokens: N, codes of a span.
        has_depth: (s,) bool, spans whose true depth has a valid pixel; (0,) without depth.
    """

    tokens: SupervisedTokens
    counts: LossCounts
    weights: "LossWeights"
    num_depth_tokens: int
    codec: "DepthVQVAE | None"
    depth: Tensor | None
    depth_valid: Tensor | None
    has_depth: Tensor
    mask_logits: Tensor | None
    mask_targets: Tensor | None
    mask_scores: Tensor | None

    @cached_property
    def merged_depth(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The d spans whose depth is known, soft-merged: depth, true depth and valid pixels, (d, H, W) each.

        None without codec or depth. Computed once, by the first part that asks.
        """
        if self.codec is None or self.depth is None:
            return None
        logits = self.tokens.span_logits(self.num_depth_tokens)
        depth = self.depth.to(logits.device)
        valid = (
            torch.ones_like(depth, dtype=torch.bool) if self.depth_valid is None else self.depth_valid.to(depth.device)
        )
        logits, depth, valid = logits[self.has_depth], depth[self.has_depth], valid[self.has_depth]
        if not len(depth):
            return logits[:0].sum() + depth, depth, valid
        own_size, size = (self.codec.config.image_size,) * 2, tuple(depth.shape[1:])
        wanted = None if size == own_size else size
        return soft_merge(logits, self.codec, temperature=self.weights.temperature, size=wanted), depth, valid

    @cached_property
    def mask_losses(self) -> dict[str, Tensor]:
        """Cross-entropy and Dice of the masks, from one pass over them; none without masks."""
        if self.mask_logits is None:
            return {}
        return mask_loss(self.mask_logits, self.mask_targets, count=self.counts.masks)[1]


@dataclass(frozen=True)
class LoggedPart:
    """A part of the loss as logs and curves know it.

    Args:
        name: in logs, and with `_weight` behind it in configurations.
        items: the field of `LossCounts` that counts what it is a mean over.
        title: above its curve.
    """

    name: str
    items: str
    title: str


@dataclass(frozen=True)
class LossPart(LoggedPart):
    """A part of the composite loss.

    Args:
        weight: its default, Sa2VA's for masks and ours for the others.
        over: its items in words.
        meaning: what it is, in words.
        optional: not computed, hence not reported, where its weight is 0: for parts that cost something by themselves.
        compute: the part of a batch, its sum over items divided by `counts`; None where the batch cannot have it.
    """

    weight: float
    over: str
    meaning: str
    optional: bool
    compute: Callable[[LossBatch], Tensor | None]


PARTS: dict[str, LossPart] = {}


def loss_part(*, items: str, weight: float, title: str, over: str, meaning: str, optional: bool = False) -> Callable:
    """Register the function below as the part of its name; see `LossPart`."""

    def register(compute: Callable[[LossBatch], Tensor | None]) -> Callable[[LossBatch], Tensor | None]:
        name = compute.__name__
        assert name not in PARTS and items in LossCounts.__dataclass_fields__
        PARTS[name] = LossPart(name, items, title, weight, over, meaning, optional, compute)
        return compute

    return register


@loss_part(items="text", weight=1.0, title="text: cross-entropy", over="words and `[SEG]`", meaning="cross-entropy")
def text(batch: LossBatch) -> Tensor:
    return mean_of(batch.tokens.text_sum(), batch.counts.text)


@loss_part(
    items="markers",
    weight=1.0,
    title="span markers: cross-entropy",
    over="`<DEPTH_START>`, `<DEPTH_END>`",
    meaning="cross-entropy over the whole vocabulary",
)
def marker(batch: LossBatch) -> Tensor:
    return mean_of(batch.tokens.marker_sum(), batch.counts.markers)


@loss_part(
    items="codes",
    weight=1.0,
    title="depth codes: cross-entropy",
    over="codes of the span",
    meaning="cross-entropy over the codes alone, or (`token_over: vocabulary`) over the whole vocabulary",
)
def token(batch: LossBatch) -> Tensor:
    return mean_of(batch.tokens.token_sum(batch.weights.token_over), batch.counts.codes)


@loss_part(
    items="responses",
    weight=1.0,
    title="number of depth codes: smooth L1",
    over="responses",
    meaning="smooth L1 (`count_beta`) between the expected number of codes and the true one, relative",
)
def count(batch: LossBatch) -> Tensor:
    return mean_of(batch.tokens.count_sum(batch.weights.count_beta), batch.counts.responses)


@loss_part(
    items="spans",
    weight=1.0,
    title="soft-merged depth: L1 + gradients",
    over="depth maps",
    meaning="codes mixed by their probabilities (soft-merge) and decoded: masked L1 to true depth and its gradients",
    optional=True,
)
def reconstruction(batch: LossBatch) -> Tensor | None:
    if batch.merged_depth is None:
        return None
    depth, target, valid = batch.merged_depth
    gradient_weight = batch.weights.gradient
    return reconstruction_loss(depth, target, valid, gradient_weight=gradient_weight, count=batch.counts.spans)


@loss_part(items="masks", weight=2.0, title="masks: cross-entropy", over="`[SEG]`", meaning="of the decoded mask")
def mask_bce(batch: LossBatch) -> Tensor | None:
    return batch.mask_losses.get("mask_bce")


@loss_part(items="masks", weight=0.5, title="masks: Dice", over="`[SEG]`", meaning="Dice of the decoded mask")
def mask_dice(batch: LossBatch) -> Tensor | None:
    return batch.mask_losses.get("mask_dice")


@loss_part(
    items="masks",
    weight=0.1,
    title="predicted IoU: squared error",
    over="`[SEG]`",
    meaning="the error of SAM2's predicted IoU",
)
def mask_score(batch: LossBatch) -> Tensor | None:
    if batch.mask_logits is None or batch.mask_scores is None:
        return None
    return score_loss(batch.mask_scores, batch.mask_logits, batch.mask_targets, count=batch.counts.masks)


def parts_table() -> str:
    """All parts as the Markdown table of docs/training.md."""
    rows = [f"| `{part.name}` | {part.weight:g} | {part.over} | {part.meaning} |" for part in PARTS.values()]
    return "\n".join(["| part | weight | over | what it is |", "|---|---|---|---|", *rows])
