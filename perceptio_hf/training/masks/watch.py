"""A watch over masks while they are learnt: what tells that they are dying, and what to do about it.

Masks die without a word: the loss goes on falling by its other parts, while every [SEG] gets the same mask, or none.
Three numbers tell before anybody looks at a picture; they are logged beside the parts of the loss.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

UNITS_OFF, ALIKE, EMPTY = "seg_units_off", "seg_alike", "masks_empty"
WATCHED = {
    UNITS_OFF: "units that are off for every [SEG]",
    ALIKE: "cosine between states of [SEG]",
    EMPTY: "share of empty masks",
}
_GOOD_DICE = 0.5  # masks whose Dice loss is below this have been learnt, however slowly they get better
_PROGRESS = 0.01  # of the Dice loss, from the first to the second half of the steps looked at


class MaskWatch:
    """Sums up what passes through a [SEG] projector and a mask decoder in training, on their own devices.

    Args:
        projector: a `SegProjector`, or a wrapper around one.
        decoder: SAM2's mask decoder, or a wrapper around one.
    """

    def __init__(self, projector: nn.Module, decoder: nn.Module):
        self._hidden, self._states = projector.linear_in.out_features, projector.linear_in.in_features
        self._clear()
        self._are_real = torch.ones(())  # whether the last states belonged to masks
        self._hooks = [
            projector.linear_in.register_forward_hook(self._see_states),
            decoder.register_forward_hook(self._see_masks),
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _clear(self) -> None:
        self._on: Tensor | None = None  # (hidden,) how often each unit was on
        self._sum: Tensor | None = None  # (states,) of the states, each of length 1
        self._seen: Tensor | None = None  # states
        self._masks: Tensor | None = None  # (2,) masks, and empty ones

    @torch.no_grad()
    def _see_states(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if not layer.training:
            return
        states = inputs[0].detach().float()
        real = (states != 0).any(1).float()  # a batch without masks sends a state of zeros through, for FSDP
        self._are_real = real.any().float()
        on = ((output.detach() > 0).float() * real[:, None]).sum(0)
        total = (nn.functional.normalize(states, dim=1) * real[:, None]).sum(0)
        self._on = on if self._on is None else self._on + on
        self._sum = total if self._sum is None else self._sum + total
        self._seen = real.sum() if self._seen is None else self._seen + real.sum()

    @torch.no_grad()
    def _see_masks(self, decoder: nn.Module, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        if not decoder.training:
            return
        empty = (output[0].detach().flatten(1) <= 0).all(1).float()
        # Of a state of zeros there is a mask too, which nobody asked for.
        counted = torch.stack([torch.ones_like(empty).sum(), empty.sum()]) * self._are_real.to(empty)
        self._masks = counted if self._masks is None else self._masks + counted

    def means(self, reduced: Callable[[list[float]], list[float]]) -> dict[str, float]:
        """The numbers of `WATCHED` since the last call, and a new start. `reduced` sums numbers over processes."""
        blank = torch.zeros(self._hidden), torch.zeros(self._states), torch.zeros(()), torch.zeros(2)
        found = (self._on, self._sum, self._seen, self._masks)
        parts = [empty if part is None else part.cpu() for part, empty in zip(found, blank, strict=True)]
        self._clear()
        sums = reduced(torch.cat([part.flatten() for part in parts]).tolist())
        on, total = sums[: self._hidden], sums[self._hidden : self._hidden + self._states]
        seen, masks, empty = sums[-3:]
        result = {}
        if seen:
            result[UNITS_OFF] = sum(count == 0 for count in on) / self._hidden
        if seen > 1:
            result[ALIKE] = (sum(value * value for value in total) - seen) / (seen * (seen - 1))
        if masks:
            result[EMPTY] = empty / masks
        return result


def trouble_with_masks(history: Sequence[Mapping[str, float]], patience: int, *, since: int = 0) -> str | None:
    """Words about masks that do not get better, and what to do, None where they do or nothing can be said yet.

    Args:
        history: `trainer.state.log_history`.
        patience: steps in which the Dice loss must have fallen; more where there is no entry in so many.
        since: the step after which to look.
    """
    logged = [entry for entry in history if "mask_dice" in entry and entry["step"] > since]
    if len(logged) < 4 or logged[-1]["step"] - since < patience:
        return None
    last = logged[-1]["step"]
    patience = max(patience, 4 * (last - logged[-2]["step"]))  # two entries on either side, however rarely is logged
    late = [entry["mask_dice"] for entry in logged if entry["step"] > last - patience / 2]
    early = [entry["mask_dice"] for entry in logged if last - patience < entry["step"] <= last - patience / 2]
    if not early or not late:
        return None
    before, now = statistics.fmean(early), statistics.fmean(late)
    if now < _GOOD_DICE or before - now > _PROGRESS:
        return None
    said = [words.format(100 * logged[-1][name]) for name, bad, words in _CAUSES if logged[-1].get(name, 0) >= bad]
    return (
        f"Masks have not got better in {patience} steps: mask_dice is {now:.3f}, and was {before:.3f}. "
        f"{' '.join(said) or _NO_CAUSE} {_ALWAYS} docs/training.md shows a run that died and one that lives."
    )


# What is looked at, from where on it is bad, and words for it.
_CAUSES: tuple[tuple[str, float, str], ...] = (
    (
        UNITS_OFF,
        0.5,
        "{:.0f} % of the [SEG] projector's units are off for every [SEG], and can learn nothing any more: start again "
        "with seg_projector_start: 256 and a seg_projector_learning_rate of a third of what it is now.",
    ),
    (
        ALIKE,
        0.98,
        "[SEG] states of different masks are nearly the same ({:.1f} % of a cosine of 1), so that all get one mask: "
        "lower the learning_rate, or teach [SEG] where to look (look_weight).",
    ),
    (EMPTY, 0.5, "{:.0f} % of the masks are empty: set mask_dice_weight: 4 and mask_bce_weight: 1."),
)
_NO_CAUSE = (
    "Nothing is dead: try another mask_learning_rate, more steps or more varied samples, and look at its masks "
    "(perceptio predict)."
)
_ALWAYS = (
    "A decoder whose prompts said nothing at first has learnt not to listen: seg_projector_start: 256, with a "
    "seg_projector_start_step at which the text loss is small, gives it others."
)
