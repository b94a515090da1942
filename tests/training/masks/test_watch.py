"""The watch over masks: its numbers beside plain ones, and when it speaks."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from perceptio_hf.modeling.mask_prediction import SegProjector
from perceptio_hf.training.masks.watch import ALIKE, EMPTY, UNITS_OFF, MaskWatch, trouble_with_masks


class Decoder(nn.Module):
    """Hands on masks (n, 1, m, h, w) and scores, as SAM2's decoder does."""

    def forward(self, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return masks, masks.amax((3, 4))


def alone(values: list[float]) -> list[float]:
    return values


def test_numbers_are_those_of_all_states_together():
    torch.manual_seed(0)
    projector, decoder = SegProjector(6, 4), Decoder()
    with torch.no_grad():
        projector.linear_in.bias[:2] = -100
    watch = MaskWatch(projector, decoder)
    states = torch.randn(9, 6) + 1
    for part in states.split((4, 1, 4)):
        projector(part.to(torch.bfloat16))
    masks = torch.full((5, 1, 2, 3, 3), -1.0)
    masks[0, 0, 1, 2, 2] = 1  # one cell of one candidate
    decoder(masks)
    projector(torch.zeros(1, 6))  # what processes without masks send through
    decoder(torch.ones(1, 1, 2, 3, 3))
    projector.eval()(torch.full((3, 6), 50.0))  # an evaluation
    found = watch.means(alone)
    states = states.bfloat16().float()
    pairs = [cosine_similarity(states[i], states[j], 0) for i in range(9) for j in range(9) if i != j]
    off = (projector.linear_in(states) <= 0).all(0).float().mean()
    assert found == pytest.approx(
        {UNITS_OFF: float(off), ALIKE: float(torch.stack(pairs).mean()), EMPTY: 0.8}, abs=1e-5
    )
    assert found[UNITS_OFF] >= 2 / 6
    assert watch.means(alone) == {}
    watch.close()
    projector.train()(states)
    assert watch.means(alone) == {}


def test_processes_are_summed():
    projector, decoder = SegProjector(3, 2), Decoder()
    watch = MaskWatch(projector, decoder)
    with torch.no_grad():
        projector.linear_in.weight.copy_(torch.eye(3))
        projector.linear_in.bias.zero_()
    projector(torch.tensor([[1.0, -1.0, -1.0]]))
    decoder(torch.ones(1, 1, 1, 2, 2))
    other = [0.0, 1.0, 0.0, *(torch.tensor([-1.0, 1.0, -1.0]) / 3**0.5).tolist(), 1.0, 1.0, 1.0]
    found = watch.means(lambda values: [one + two for one, two in zip(values, other, strict=True)])
    assert found == pytest.approx({UNITS_OFF: 1 / 3, ALIKE: -1 / 3, EMPTY: 0.5})


def history(dice: list[float], **last: float) -> list[dict]:
    entries = [{"step": 10 * (place + 1), "mask_dice": value} for place, value in enumerate(dice)]
    entries.insert(1, {"step": 10, "eval_loss": 1.0})
    entries[-1] |= last
    return entries


def test_progress_is_silence():
    falling = [0.9 - 0.01 * step for step in range(20)]
    assert trouble_with_masks(history(falling), 100) is None
    assert trouble_with_masks(history([0.2] * 20), 100) is None  # learnt
    assert trouble_with_masks(history([0.8] * 9), 100) is None  # too early
    assert trouble_with_masks(history([0.8] * 20), 100, since=150) is None  # warned a moment ago


def test_whoever_logs_rarely_is_warned_too():
    rare = [{"step": 500 * place, "mask_dice": 0.9, EMPTY: 1.0} for place in range(1, 11)]
    assert trouble_with_masks(rare[:3], 200) is None
    assert "not got better in 2000 steps" in trouble_with_masks(rare, 200)


def test_standstill_is_named_with_its_cause():
    words = trouble_with_masks(history([0.9, 0.85, *[0.81] * 20], seg_units_off=0.97, seg_alike=0.5), 100)
    assert "not got better in 100 steps: mask_dice is 0.810" in words
    assert "97 % of the [SEG] projector's units are off" in words and "nearly the same" not in words
    words = trouble_with_masks(history([0.81] * 20, seg_units_off=0.1, seg_alike=0.995, masks_empty=0.8), 100)
    assert "nearly the same (99.5 %" in words and "80 % of the masks are empty" in words and "units" not in words
    assert "Nothing is dead" in trouble_with_masks(history([0.81] * 20), 100)
