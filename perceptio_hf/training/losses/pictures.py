"""Losses of the pictures behind spatial tokens: depth, read differentiably from code probabilities, and masks."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .words import mean_of

if TYPE_CHECKING:
    from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE


def soft_merge(
    code_logits: Tensor, codec: "DepthVQVAE", *, temperature: float = 1.0, size: tuple[int, int] | None = None
) -> Tensor:
    """Depth from the probabilities of codes.

    q = softmax(logits / temperature), each place gets the code vector q C, and the codec decodes the grid of them.

    Gradients reach the logits through the decoder, and never its parameters, whether they require gradients or not.

    Args:
        code_logits: (n, N, K) logits of the K codes at the N places of each span, any floating dtype.
        temperature: 0 or more; towards 0 this becomes the depth of the most probable codes, which is what 0 itself
            gives, without a gradient.
        size: (height, width) to resample to; None keeps the codec's (S, S).

    Returns:
        (n, S, S) or (n, *size) float32 relative inverse depth in [0, 1].

    Raises:
        ValueError: if N or K are not the codec's, or the temperature is negative or not finite.
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"`temperature` is {temperature}; expected a finite number of 0 or more.")
    logits = code_logits.to(torch.promote_types(code_logits.dtype, torch.float32))
    if temperature == 0:
        probabilities = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    else:
        # Softmax does not change when the largest logit is taken away; however small the temperature, none overflows.
        probabilities = ((logits - logits.detach().amax(-1, keepdim=True)) / temperature).softmax(-1)
    parameters = {f"codec.{name}": parameter.detach() for name, parameter in codec.named_parameters()}
    return functional_call(_SoftDecoding(codec), parameters, (probabilities, size))


class _SoftDecoding(nn.Module):
    """`decode_soft` as a forward, which is what `functional_call` calls."""

    def __init__(self, codec: "DepthVQVAE"):
        super().__init__()
        self.codec = codec

    def forward(self, probabilities: Tensor, size: tuple[int, int] | None) -> Tensor:
        return self.codec.decode_soft(probabilities, size=size)


def reconstruction_loss(
    depth: Tensor, target: Tensor, valid: Tensor, *, gradient_weight: float = 0.5, count: float | None = None
) -> Tensor:
    """Masked L1 of depth maps, plus the same of the differences between neighbours.

    Per map: mean |error| over valid pixels + `gradient_weight` * mean |difference of the error| over pairs of
    neighbours, side by side or one above the other, that are both valid.

    Args:
        depth, target: (s, H, W) relative inverse depth in [0, 1]. What `target` holds at invalid pixels, NaN included,
            is never looked at.
        valid: (s, H, W) bool.
        count: what the sum over maps is divided by; None: the maps with a valid pixel here.

    Returns:
        A scalar; zero, with a graph, if no map has a valid pixel.

    Raises:
        ValueError: if shapes differ.
    """
    if not depth.ndim == 3 or not depth.shape == target.shape == valid.shape:
        raise ValueError(
            f"`depth` is {tuple(depth.shape)}, `target` {tuple(target.shape)}, `valid` {tuple(valid.shape)}; expected "
            "(maps, height, width) for all three."
        )
    valid = valid.bool()
    depth = depth.to(torch.promote_types(depth.dtype, torch.float32))
    error = torch.where(valid, depth - torch.where(valid, target.to(depth.dtype), 0), 0)
    loss = _mean_per_map(error.abs(), valid)
    total, pairs = torch.zeros_like(loss), torch.zeros_like(loss)
    for axis in (1, 2):
        both = valid[:, 1:] & valid[:, :-1] if axis == 1 else valid[:, :, 1:] & valid[:, :, :-1]
        total = total + torch.where(both, error.diff(dim=axis).abs(), 0).sum((1, 2))
        pairs = pairs + both.sum((1, 2))
    loss = loss + gradient_weight * total / pairs.clamp(min=1)
    return mean_of(loss.sum(), int(valid.flatten(1).any(1).sum()) if count is None else count)


def _mean_per_map(values: Tensor, valid: Tensor) -> Tensor:  # (s, H, W), zero where invalid -> (s,)
    return values.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)


def mask_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    bce_weight: float = 2.0,
    dice_weight: float = 0.5,
    count: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sigmoid binary cross-entropy and Dice, averaged over masks; the default weights are Sa2VA's.

    Args:
        logits: (n, h, w) from the mask decoder.
        targets: (n, h, w) share of each cell that is inside, in [0, 1].
        bce_weight, dice_weight: of the two parts.
        count: what the sums over masks are divided by; None: n.

    Returns:
        The weighted sum and its parts, scalars; zero (with a graph) where n = 0.

    Raises:
        ValueError: if shapes differ.
    """
    if logits.ndim != 3 or logits.shape != targets.shape:
        raise ValueError(
            f"The mask logits are {tuple(logits.shape)}, the targets {tuple(targets.shape)}; expected (masks, height, "
            "width) for both, at the mask decoder's resolution."
        )
    count = len(logits) if count is None else count
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.to(logits.dtype)
    pixels = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    inside = logits.sigmoid()
    overlap = (inside * targets).sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (inside.sum((1, 2)) + targets.sum((1, 2)) + 1)
    parts = {"mask_bce": mean_of(pixels.mean((1, 2)).sum(), count), "mask_dice": mean_of(dice.sum(), count)}
    return bce_weight * parts["mask_bce"] + dice_weight * parts["mask_dice"], parts


def score_loss(scores: Tensor, logits: Tensor, targets: Tensor, *, count: float | None = None) -> Tensor:
    """Squared error of the predicted IoU (n,) against the IoU that the masks (n, h, w) really reach, averaged.

    `count` is what the sum is divided by; None: n. The masks get no gradient.
    """
    inside, truth = logits > 0, targets > 0.5
    union = (inside | truth).sum((1, 2)).clamp(min=1)
    error = scores.to(torch.promote_types(scores.dtype, torch.float32)) - (inside & truth).sum((1, 2)) / union
    return mean_of(error.square().sum(), len(scores) if count is None else count)
