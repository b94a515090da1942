"""Whether a Perceptio that was saved has the weights of its parts, and without spatial tokens the InternVL's logits.

Weights that are taken over are compared bit for bit, by digests, so that no second copy is in memory; settings, such as
the epsilon of a norm, field by field. What is computed from them is compared within rounding: in which order a product
is summed, and with it the last bits, depends on the processor, and with some libraries on where operands lie in memory.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    BatchFeature,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerBase,
    Sam2Model,
)

from perceptio_hf.conversion.written import digest, settings_of
from perceptio_hf.modeling.configuration_depth_vqvae import unknown_keys
from perceptio_hf.modeling.configuration_perceptio import PerceptioConfig
from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE
from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio_hf.processing.processing_perceptio import PerceptioProcessor

from .predecessor import Predecessor

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
_MATRICES = ("model.language_model.embed_tokens.weight", "lm_head.weight")  # the two with a row for every token
# What the result's configuration says otherwise than the parts'.
_OWN_SETTINGS = {"model_type", "text_config.vocab_size"}
_SAFETY = 8  # of the bound on rounding; between processors with quite other kernels the whole formula gave 1.2 at most


@dataclass(frozen=True)
class Check:
    """What a verification looked at, and what it saw.

    Args:
        weights: tensors that are, bit for bit, those of the parts; of embedding and head the rows that are not new.
        prompts: how many.
        positions: of the prompts together at which logits were compared.
        tokens: logits compared at each, those of all tokens that are not new.
        sampled: whether that is only a part of the prompts and positions that smaller models are checked with.
        largest_difference: between a logit and the InternVL's. It is not 0 where a matrix product is summed in another
            order, which may depend on the processor, and on the length of the head.
        largest_allowed: the bound on it for the prompt with the largest logits, see `rounding_bound`.
        spatial_probability: the largest share that the spatial tokens have together at one position.
    """

    weights: int
    prompts: int
    positions: int
    tokens: int
    sampled: bool
    largest_difference: float
    largest_allowed: float
    spatial_probability: float


@dataclass(frozen=True)
class Reference:
    """What the parts are, before they are joined.

    Args:
        digests: of each tensor, by its name in the result.
        settings: every field of their configurations, by its place in the result's.
        kept: (n,) the rows of embedding and head that belong to no new token.
        inputs: of some prompts.
        logits: what the InternVL answers to each, (positions, V) of its last ones.
        sampled: whether these are fewer than smaller models are asked.
    """

    digests: dict[str, bytes]
    settings: dict[str, Any]
    kept: Tensor
    inputs: list[BatchFeature]
    logits: list[Tensor]
    sampled: bool


def take_reference(
    internvl: InternVLForConditionalGeneration,
    mask_model: Sam2Model,
    codec: DepthVQVAE,
    processor: PerceptioProcessor,
    like: Predecessor | None = None,
) -> Reference:
    """Note every weight of the parts, and ask the InternVL what its successor will be asked.

    That is four texts and two pictures, or one of each if it is large. Of `like`, whose SAM2 and codec the others are,
    [SEG] projector and settings are noted too.
    """
    rows = torch.ones(internvl.get_input_embeddings().num_embeddings, dtype=torch.bool)
    rows[[token for token in processor.added_token_ids if token < len(rows)]] = False
    kept = rows.nonzero()[:, 0]
    parts: dict[str, nn.Module] = {"": internvl, "mask_model.": mask_model, "depth_model.": codec}
    if like is not None:
        parts["seg_projector."] = like.projector
    digests = {}
    for prefix, part in parts.items():
        for name, value in part.state_dict().items():
            if prefix and value.is_floating_point():  # exact: nobody saves these in more than float32
                value = value.float()
            digests[prefix + name] = digest(value, kept if prefix + name in _MATRICES else None)
    configs = {"": internvl.config, "mask_config.": mask_model.config, "depth_config.": codec.config}
    settings = {
        prefix + name: value for prefix, config in configs.items() for name, value in settings_of(config, _OWN_SETTINGS)
    }
    foreign = set(unknown_keys(PerceptioConfig, internvl.config.to_dict()))  # of other programs; Perceptio drops them
    settings = {name: value for name, value in settings.items() if name.partition(".")[0] not in foreign}
    settings |= like.settings if like else {}
    sampled = internvl.num_parameters() > SMALL
    inputs = _prompts(processor, sampled)
    logits = []
    for prompt in inputs:
        with torch.no_grad():
            logits.append(internvl(**prompt.to(internvl.device), logits_to_keep=_LAST if sampled else 0).logits[0])
    return Reference(digests, settings, kept, inputs, logits, sampled)


def added_digests(reference: Reference, model: PerceptioForConditionalGeneration) -> dict[str, bytes]:
    """Of a model that was joined, the digests of what it has beside its parts: the [SEG] projector and new rows."""
    values = model.state_dict()
    new = values.keys() - reference.digests.keys() | values.keys() & set(_MATRICES)
    return {name: digest(values[name]) for name in sorted(new)}


def check_against(
    reference: Reference, model: PerceptioForConditionalGeneration, added: dict[str, bytes] | None = None
) -> Check:
    """Compare a model with its parts: every weight bit for bit, and its logits within rounding.

    Args:
        reference: of the parts.
        model: as it was loaded again.
        added: `added_digests` of the model before it was saved.

    Raises:
        ValueError: a weight is not what it was, or the logits differ by more than rounding.
    """
    _check_weights(reference, model, added or {})
    _check_settings(reference, model)
    return _check_logits(reference, model)


def rounding_bound(config: InternVLConfig, dtype: torch.dtype, scale: float) -> float:
    """How far two ways to sum the same products may move a logit.

    Every layer rounds its results to `dtype` (relative error: its epsilon) and sums products over the width in float32
    (relative error of a sum of n, in whatever order: about sqrt(n) epsilons). The errors of different layers are
    independent, so that those of n layers come to sqrt(n) times one's.

    Args:
        config: of the InternVL: its depth and width.
        dtype: of its weights.
        scale: the largest logit, which the relative errors refer to.
    """
    parts = config.text_config, config.vision_config
    depth = sum(part.num_hidden_layers for part in parts)
    width = max(max(part.hidden_size, part.intermediate_size) for part in parts)
    epsilon = torch.finfo(dtype).eps
    summing = min(epsilon, torch.finfo(torch.float32).eps) * math.sqrt(width)
    return _SAFETY * scale * math.sqrt(depth) * (epsilon + summing)


def _check_weights(reference: Reference, model: PerceptioForConditionalGeneration, added: dict[str, bytes]) -> None:
    values = model.state_dict()
    changed = {}  # in order, and each name once
    for digests, rows in ((reference.digests, reference.kept), (added, None)):
        for name, expected in digests.items():
            chosen = rows if name in _MATRICES else None
            if name not in values or digest(values[name], chosen) != expected:
                changed[name] = True
    if changed:
        raise ValueError(
            f"The result does not have the weights of its parts: {next(iter(changed))} differs ({len(changed)} of "
            f"{len(values)} tensors do). Nothing was written. Please report this, with the versions of torch and "
            "transformers."
        )


def _check_settings(reference: Reference, model: PerceptioForConditionalGeneration) -> None:
    """Of some, such as the epsilon of a norm, the logits would not tell."""
    found = dict(settings_of(model.config, _OWN_SETTINGS))
    for name, expected in reference.settings.items():
        if name not in found or found[name] != expected:
            raise ValueError(_difference(f"config.json has {name} = {found.get(name)!r} instead of {expected!r}"))


def _check_logits(reference: Reference, model: PerceptioForConditionalGeneration) -> Check:
    difference = allowed = probability = 0.0
    positions = 0
    for prompt, expected in zip(reference.inputs, reference.logits, strict=True):
        with torch.no_grad():
            logits = model(**prompt.to(model.device), logits_to_keep=len(expected)).logits[0]
        found, expected = logits[:, reference.kept].float(), expected[:, reference.kept].float()
        bound = rounding_bound(model.config, model.dtype, float(expected.abs().max()))
        gap = float((found - expected).abs().max())
        if not gap <= bound:  # NaN is no small gap
            raise ValueError(_difference(f"logits differ by up to {gap:.2g}, and rounding explains {bound:.2g}"))
        lead = expected.max(-1).values - expected.gather(-1, found.argmax(-1, keepdim=True))[:, 0]
        if not float(lead.max()) <= bound:
            raise ValueError(_difference("another token is the likeliest one"))
        shares = logits.float().softmax(-1)[:, _spatial_ids(model)].sum(-1)
        difference, allowed = max(difference, gap), max(allowed, bound)
        probability, positions = max(probability, float(shares.max())), positions + len(expected)
    weights, prompts, tokens = len(reference.digests), len(reference.inputs), len(reference.kept)
    return Check(weights, prompts, positions, tokens, reference.sampled, difference, allowed, probability)


def _difference(what: str) -> str:
    return (
        f"The result does not compute what its InternVL computes: {what}. Nothing was written. Please report this, "
        "with the versions of torch and transformers."
    )


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


def _spatial_ids(model: PerceptioForConditionalGeneration) -> list[int]:
    config = model.config
    return [config.seg_token_id, config.depth_start_token_id, config.depth_end_token_id, *config.depth_token_ids]
