"""Whether a Perceptio that was saved computes, without spatial tokens, what its InternVL computed."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, InternVLForConditionalGeneration, PreTrainedTokenizerBase

from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio_hf.processing.processing_perceptio import PerceptioProcessor

SMALL = 100_000_000  # parameters up to which every position of every prompt is compared
_LAST = 4  # positions of each prompt that are compared in larger models
_QUESTIONS = (
    "Which of the two is closer, the cup or the lamp?",
    "Schreibe 3,14159 in Worten.\n\n\tdef area(r): return 3.14159 * r ** 2",
    "左边的椅子比右边的桌子更近吗？ 🙂",
    "0",
)
_INPUTS = ("input_ids", "attention_mask", "pixel_values")
_PICTURES = ((448, 448), (640, 231))  # width, height: one tile and, where the model tiles, several


@dataclass(frozen=True)
class Check:
    """What a verification looked at, and what it saw.

    Args:
        prompts: how many.
        positions: of the prompts together at which logits were compared.
        tokens: logits compared at each, those of all tokens that are not new.
        sampled: whether that is only a part of the prompts and positions that smaller models are checked with.
        largest_difference: between logits of the whole heads. It is not 0 only where the processor's matrix product
            rounds otherwise for a longer head; the products of equally long heads are equal.
        spatial_probability: the largest share that the spatial tokens have together at one position.
    """

    prompts: int
    positions: int
    tokens: int
    sampled: bool
    largest_difference: float
    spatial_probability: float


@dataclass(frozen=True)
class Reference:
    """What an InternVL answers to some prompts: their inputs and, for each, logits (positions, V) of the last ones."""

    inputs: list[BatchFeature]
    logits: list[Tensor]
    sampled: bool


def take_reference(internvl: InternVLForConditionalGeneration, processor: PerceptioProcessor) -> Reference:
    """Ask an InternVL what its successor will be asked: four texts and two pictures, or one of each if it is large."""
    sampled = internvl.num_parameters() > SMALL
    inputs = _prompts(processor, sampled)
    logits = []
    for prompt in inputs:
        with torch.no_grad():
            logits.append(internvl(**prompt.to(internvl.device), logits_to_keep=_LAST if sampled else 0).logits[0])
    return Reference(inputs, logits, sampled)


def check_against(reference: Reference, model: PerceptioForConditionalGeneration, new_ids: Collection[int]) -> Check:
    """Compare every logit of a token that is not new, bit for bit.

    Raises:
        ValueError: they differ.
    """
    compared = torch.ones(reference.logits[0].shape[-1], dtype=torch.bool)
    compared[[token for token in new_ids if token < len(compared)]] = False
    difference = probability = 0.0
    for prompt, expected in zip(reference.inputs, reference.logits, strict=True):
        whole, cut = _logits(model, prompt, *expected.shape)
        if not torch.equal(cut[:, compared], expected[:, compared]):
            gap = (cut - expected)[:, compared].abs().max()
            raise ValueError(
                f"The result does not compute what its InternVL computes: logits differ by up to {gap:.2g}. Nothing "
                "was written. Please report this, with the versions of torch and transformers."
            )
        difference = max(difference, float((whole[:, : len(compared)] - expected)[:, compared].abs().max()))
        shares = whole.float().softmax(-1)[:, _spatial_ids(model)].sum(-1)
        probability = max(probability, float(shares.max()))
    positions = sum(len(expected) for expected in reference.logits)
    return Check(len(reference.inputs), positions, int(compared.sum()), reference.sampled, difference, probability)


def check_tokens(before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase) -> None:
    """Text without spatial tokens gives the same ids as before.

    Raises:
        ValueError: it does not.
    """
    for text in _QUESTIONS:
        if before(text)["input_ids"] != after(text)["input_ids"]:
            raise ValueError(f"The tokenizer with spatial tokens reads {text!r} differently; nothing was written.")


def _prompts(processor: PerceptioProcessor, sampled: bool) -> list[BatchFeature]:
    """What stock InternVL takes of the processor's output, one prompt each."""
    questions, sizes = (_QUESTIONS[:1], _PICTURES[:1]) if sampled else (_QUESTIONS, _PICTURES)
    pairs = [(question, None) for question in questions]
    pairs += [(f"{processor.image_token}\n{_QUESTIONS[0]}", _picture(*size)) for size in sizes]
    prompts = [processor(images=picture, text=[text], return_tensors="pt") for text, picture in pairs]
    return [BatchFeature({name: prompt[name] for name in _INPUTS if name in prompt}) for prompt in prompts]


def _picture(width: int, height: int) -> Image.Image:
    """Colour gradients under noise, the same every time."""
    ramp = np.add.outer(np.linspace(0, 120, height), np.linspace(0, 80, width))[:, :, None] * [1.0, 0.7, 0.4]
    noise = np.random.default_rng(0).uniform(0, 55, (height, width, 3))
    return Image.fromarray((ramp + noise).astype(np.uint8))


def _logits(
    model: PerceptioForConditionalGeneration, prompt: BatchFeature, positions: int, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """(positions, V') logits of the whole head, and (positions, V) of its first V rows alone."""
    with torch.no_grad():
        output = model(**prompt.to(model.device), logits_to_keep=positions)
        hidden = output.last_hidden_state[:, -positions:]
        return output.logits[0], F.linear(hidden, model.lm_head.weight[:vocabulary])[0]


def _spatial_ids(model: PerceptioForConditionalGeneration) -> list[int]:
    config = model.config
    return [config.seg_token_id, config.depth_start_token_id, config.depth_end_token_id, *config.depth_token_ids]
