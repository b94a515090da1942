"""Losses against plain loops."""

import math

import pytest
import torch

from perceptio_hf.training.losses import mask_loss, score_loss


def naive_mask_loss(logits, targets, bce_weight, dice_weight):
    bces, dices = [], []
    for rows, truth in zip(logits.tolist(), targets.tolist(), strict=True):
        pixels = [(x, t) for row, line in zip(rows, truth, strict=True) for x, t in zip(row, line, strict=True)]
        inside = [1 / (1 + math.exp(-x)) for x, _ in pixels]
        bces.append(-sum(t * math.log(p) + (1 - t) * math.log(1 - p) for p, (_, t) in zip(inside, pixels, strict=True)))
        overlap = sum(p * t for p, (_, t) in zip(inside, pixels, strict=True))
        dices.append(1 - (2 * overlap + 1) / (sum(inside) + sum(t for _, t in pixels) + 1))
    pixels = logits[0].numel()
    return bce_weight * sum(bces) / len(bces) / pixels + dice_weight * sum(dices) / len(dices)


@pytest.mark.parametrize(("bce_weight", "dice_weight"), [(2.0, 0.5), (1.0, 4.0)])
def test_mask_loss_equals_a_loop(bce_weight, dice_weight):
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 5, 7) * 2, torch.rand(3, 5, 7)
    loss, parts = mask_loss(logits, targets, bce_weight=bce_weight, dice_weight=dice_weight)
    assert loss.item() == pytest.approx(naive_mask_loss(logits, targets, bce_weight, dice_weight), rel=1e-5)
    assert loss.item() == pytest.approx((bce_weight * parts["mask_bce"] + dice_weight * parts["mask_dice"]).item())


def test_perfect_masks_cost_nothing():
    targets = (torch.rand(2, 6, 6) > 0.5).float()
    loss, _ = mask_loss((targets - 0.5) * 200, targets)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_no_masks_give_a_zero_with_a_graph():
    logits = torch.zeros(0, 4, 4, requires_grad=True)
    loss, _ = mask_loss(logits, torch.zeros(0, 4, 4))
    loss.backward()
    assert loss.item() == 0
    assert score_loss(torch.zeros(0), logits, torch.zeros(0, 4, 4)).item() == 0


def test_score_loss_measures_the_estimate_of_the_overlap():
    logits = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]])
    targets = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])  # intersection 1, union 3
    assert score_loss(torch.tensor([1 / 3]), logits, targets).item() == pytest.approx(0, abs=1e-7)
    assert score_loss(torch.tensor([1.0]), logits, targets).item() == pytest.approx((2 / 3) ** 2)
