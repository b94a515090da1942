"""Losses of spatial tokens: pure functions with the reduction they state."""

import torch
import torch.nn.functional as F


def mask_loss(
    logits: torch.Tensor, targets: torch.Tensor, *, bce_weight: float = 2.0, dice_weight: float = 0.5
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sigmoid binary cross-entropy and Dice, averaged over masks; the default weights are Sa2VA's.

    Args:
        logits: (n, h, w) from the mask decoder.
        targets: (n, h, w) share of each cell that is inside, in [0, 1].
        bce_weight, dice_weight: of the two parts.

    Returns:
        The weighted sum and its parts, scalars; zero (with a graph) where n = 0.
    """
    if not len(logits):
        zero = logits.sum() * 0
        return zero, {"mask_bce": zero, "mask_dice": zero}
    logits, targets = logits.float(), targets.float()
    bce = F.binary_cross_entropy_with_logits(logits, targets)
    inside = logits.sigmoid()
    overlap = (inside * targets).sum((1, 2))
    dice = (1 - (2 * overlap + 1) / (inside.sum((1, 2)) + targets.sum((1, 2)) + 1)).mean()
    return bce_weight * bce + dice_weight * dice, {"mask_bce": bce, "mask_dice": dice}


def score_loss(scores: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Squared error of the predicted IoU (n,) against the IoU that the masks (n, h, w) really reach, averaged."""
    if not len(scores):
        return scores.sum() * 0
    inside, truth = logits > 0, targets > 0.5
    union = (inside | truth).sum((1, 2)).clamp(min=1)
    return F.mse_loss(scores, (inside & truth).sum((1, 2)) / union)
