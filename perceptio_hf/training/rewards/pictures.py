"""Rewards of depth and masks: what a completion's codes and [SEG] become, beside the truth."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from perceptio_hf.data.depth_maps import DepthMap
from perceptio_hf.data.encoded import load_depth, load_mask

from .texts import said, spans_of

if TYPE_CHECKING:
    from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE
    from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
    from perceptio_hf.processing.processing_perceptio import PerceptioProcessor

_PAIRS = 512  # of places whose order is compared
_CLEAR = 0.05  # relative inverse depth by which one must be nearer than the other


class _OfDepth:
    """A reward of the first span of a completion, for samples with a depth map; 0 where there is no whole span."""

    uses_model = True  # its codec
    needs = "depth"  # the column without which a sample gets no reward

    def __init__(self, codec: "DepthVQVAE"):
        self.codec = codec

    @torch.no_grad()
    def __call__(
        self,
        completions: Sequence[Any],
        depth: Sequence[Any],
        depth_unit: Sequence[str | None],
        depth_valid: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        rewards: list[float | None] = []
        depth_valid = depth_valid or [None] * len(completions)
        for completion, source, unit, valid in zip(completions, depth, depth_unit, depth_valid, strict=True):
            spans = spans_of(said(completion))
            whole = spans and len(spans[0]) == self.codec.config.num_tokens
            if not source:
                rewards.append(None)
            elif not whole:
                rewards.append(0.0)
            else:
                true = _true_depth(_frozen(source[0]), _frozen(valid[0]) if valid else None, unit)
                rewards.append(self.compare(self._decoded(spans[0], true.relative.shape), true))
        return rewards

    def _decoded(self, codes: list[int], size: tuple[int, int]) -> np.ndarray:
        """(H, W) relative inverse depth."""
        device = next(self.codec.parameters()).device
        depth = self.codec.decode(torch.tensor([codes], device=device))[None]
        return F.interpolate(depth, size=size, mode="bilinear")[0, 0].float().cpu().numpy()

    def compare(self, depth: np.ndarray, true: DepthMap) -> float:
        raise NotImplementedError


class DepthError(_OfDepth):
    """1 - mean error of relative inverse depth over the pixels with a reading."""

    __name__ = "depth_error"

    def compare(self, depth: np.ndarray, true: DepthMap) -> float:
        return float(1 - np.abs(depth - true.relative)[true.valid].mean())


class DepthOrder(_OfDepth):
    """The share of pairs of places of which the right one is nearer, among pairs that differ clearly; a map is always
    asked about the same ones. Guessing gives 0.5."""

    __name__ = "depth_order"

    def compare(self, depth: np.ndarray, true: DepthMap) -> float:
        rng = np.random.default_rng(0)
        places = np.flatnonzero(true.valid)
        first, second = rng.choice(places, (2, _PAIRS))
        truth = true.relative.flat[first] - true.relative.flat[second]
        clear = np.abs(truth) >= _CLEAR
        if not clear.any():
            return 1.0
        found = depth.flat[first] - depth.flat[second]
        return float((np.sign(found) == np.sign(truth))[clear].mean())


class MaskIoU:
    """The IoU of a completion's masks with the sample's, in the order in which they are named, by one forward pass.

    A mask that is missing, too many, or of a picture of another size, counts as 0.

    Args:
        model: the one that is trained; its [SEG] become masks.
    """

    __name__ = "mask_iou"
    uses_model = True
    needs = "masks"

    def __init__(self, model: "PerceptioForConditionalGeneration", processor: "PerceptioProcessor"):
        self.model, self.processor = model, processor

    @torch.no_grad()
    def __call__(
        self,
        completions: Sequence[Any],
        prompts: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        masks: Sequence[Any],
        **columns: Any,
    ) -> list[float | None]:
        rewards: list[float | None] = [None if not truths else 0.0 for truths in masks]
        asked = [row for row, text in enumerate(map(said, completions)) if masks[row] and "[SEG]" in text]
        if not asked:
            return rewards
        with _evaluating(self.model):
            found = self._masks([prompts[row] for row in asked], [completion_ids[row] for row in asked])
        for row, own in zip(asked, found, strict=True):
            pairs = [(one, _true_mask(mask, one.shape)) for one, mask in zip(own, masks[row], strict=False)]
            ious = [_iou(one, other) for one, other in pairs if one.shape == other.shape]
            rewards[row] = sum(ious) / max(len(own), len(masks[row]))
        return rewards

    def _masks(self, prompts: list, completion_ids: list[Sequence[int]]) -> list[list[np.ndarray]]:
        """The (H, W) bool masks of each completion, in the order of its [SEG]."""
        tokenizer = self.processor.tokenizer
        inputs = self.processor.apply_chat_template(
            prompts,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            padding_side="left",
        ).to(self.model.device)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        rows = [torch.as_tensor(ids, device=self.model.device) for ids in completion_ids]
        ends = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        out = self.model.decode_spatial(torch.cat([inputs["input_ids"], ends], 1), **inputs)
        answers = self.processor.post_process_spatial(out)
        found = []
        for answer, owners in zip(answers, out.mask_pictures, strict=True):
            of_each = [iter(picture.masks) for picture in answer.pictures]
            found.append([next(of_each[owner]) for owner in owners])
        return found


@contextmanager
def _evaluating(model: nn.Module):
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    union = (one | other).sum()
    return float((one & other).sum() / union) if union else 1.0


def _true_mask(mask: Any, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool, of the sample's picture; polygons can be drawn on any, and say of which they are."""
    own = mask.get("size") if isinstance(mask, Mapping) else None
    return load_mask(mask, tuple(own or size))


def _frozen(entry: Any) -> Any:
    """A file or a mask as a column holds it, as a key."""
    if isinstance(entry, Mapping):
        return tuple((name, _frozen(value)) for name, value in entry.items())
    return tuple(map(_frozen, entry)) if isinstance(entry, (list, tuple)) else entry


@lru_cache(maxsize=64)
def _true_depth(depth: tuple, valid: tuple | None, unit: str) -> DepthMap:
    """Read once for all completions of a prompt, and all rewards.

    Args:
        depth, valid: `_frozen`.
    """
    return load_depth(dict(depth), unit, None if valid is None else load_mask(dict(valid)))
