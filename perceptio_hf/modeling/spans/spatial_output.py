"""What `generate` and `decode_spatial` return."""

from dataclasses import dataclass

import torch
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput


@dataclass
class SpatialOutput(ModelOutput):
    """Masks and depth of a batch of token sequences; `processor.post_process_spatial` turns it into answers.

    Lists have one entry per row of `sequences`. Spans that are broken have no depth map; see `well_formed`.

    Args:
        sequences: (rows, length) token ids, prompt and response.
        prompt_length: where the responses begin.
        mask_logits: per row (n, h, w) float32 at the mask decoder's resolution, one per [SEG].
        mask_scores: per row (n,) IoU with the true mask as SAM2 predicts it.
        mask_pictures: per row n indices: the picture of the row each mask lies on.
        depth_maps: per row (m, S, S) relative inverse depth in [0, 1], 1 = nearest, one per depth span.
        depth_codes: per row (m, N) codes 0..K-1.
        depth_confidence: per row (m, g, g) probability of each chosen code among all codes; NaN where unknown.
        depth_pictures: per row m picture indices.
        well_formed: per row, False where a span is broken.
        picture_sizes: per row the (height, width) of each of its pictures in pixels; None if they were not given.
    """

    sequences: torch.LongTensor | None = None
    prompt_length: int | None = None
    mask_logits: list[torch.Tensor] | None = None
    mask_scores: list[torch.Tensor] | None = None
    mask_pictures: list[list[int]] | None = None
    depth_maps: list[torch.Tensor] | None = None
    depth_codes: list[torch.Tensor] | None = None
    depth_confidence: list[torch.Tensor] | None = None
    depth_pictures: list[list[int]] | None = None
    well_formed: list[bool] | None = None
    picture_sizes: list[list[tuple[int, int]]] | None = None


@dataclass
class PerceptioGenerateOutput(SpatialOutput, GenerateDecoderOnlyOutput):
    """What `generate(return_dict_in_generate=True)` returns: transformers' fields and those of `SpatialOutput`."""


@dataclass
class PerceptioGenerateBeamOutput(SpatialOutput, GenerateBeamDecoderOnlyOutput):
    """The same for beam search."""
