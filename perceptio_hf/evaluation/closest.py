"""Which marked point is the nearest: asked without shortcuts, and with the depth span replaced before the answer.

The Token Replacement Test (after AURORA's question whether depth tokens are used): the prompt, the picture and the
decoding stay, the codes of the span change. If the answers do not change with them, they never rested on the span.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.world import draw_points, render_scene
from ..data.world.fair import FairSet
from .answering import encode_questions, token_budget
from .benchmarks.prompts import ask, named_letters
from .replacement import answers_with_codes
from .scenes import conclusion

if TYPE_CHECKING:
    from transformers import BatchFeature

    from ..modeling.modeling_perceptio import PerceptioForConditionalGeneration
    from ..processing.processing_perceptio import PerceptioProcessor

REPLACEMENTS = ("own", "oracle", "random", "other_image", "first_repeat")


def answer_closest(
    model: "PerceptioForConditionalGeneration",
    processor: "PerceptioProcessor",
    sets: Sequence[FairSet],
    *,
    spatial: str = "depth",
    batch_size: int = 128,
    progress: Callable[[Iterable], Iterable] = iter,
) -> tuple[list[str], Tensor | None]:
    """Greedy answers to fair questions.

    Returns:
        The conclusions, and the codes (n, N) of the model's own spans, None with `spatial="none"`.
    """
    texts, codes = [], []
    for start in progress(range(0, len(sets), batch_size)):
        inputs = _inputs(processor, sets[start : start + batch_size])
        inputs.pop("mask_pixel_values")  # the answers have no masks
        out = model.generate(**inputs, do_sample=False, spatial=spatial, return_dict_in_generate=True)
        answers = processor.post_process_spatial(out)
        texts += [conclusion(answer.text) for answer in answers]
        codes += [answer.depth_codes for answer in answers]
    return texts, torch.tensor(codes) if spatial == "depth" else None


@torch.no_grad()
def token_replacement(
    model: "PerceptioForConditionalGeneration",
    processor: "PerceptioProcessor",
    sets: Sequence[FairSet],
    own: Tensor,
    *,
    replacements: Sequence[str] = REPLACEMENTS,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, float]:
    """Accuracy on `sets` with the span's codes replaced; every picture is encoded once for all replacements.

    Args:
        own: (n, N) codes of the model's own spans.
        replacements: own (unchanged); oracle, of the true depth; random, each code drawn by itself as often as it
            occurs in true spans; other_image, the own span of another picture of the sets; first_repeat, the own first
            code everywhere.

    Returns:
        `trt_REPLACEMENT` for each.
    """
    oracle = torch.cat([_true_codes(model, sets[at : at + batch_size]) for at in range(0, len(sets), batch_size)])
    spans = _replaced(own, oracle, replacements, torch.Generator().manual_seed(seed))
    right = torch.zeros(len(replacements))
    for start in progress(range(0, len(sets), batch_size)):
        chunk = sets[start : start + batch_size]
        codes = {name: span[start : start + batch_size].numpy() for name, span in spans.items()}
        texts = answers_with_codes(
            model,
            processor,
            _inputs(processor, chunk),
            [[]] * len(chunk),
            codes,
            spatial="depth",
            max_new_tokens=token_budget(model),
        )
        for index, name in enumerate(replacements):
            right[index] += sum(conclusion(text) == item.answer for text, item in zip(texts[name], chunk, strict=True))
    return {f"trt_{name}": float(value) / len(sets) for name, value in zip(replacements, right, strict=True)}


def _inputs(processor: "PerceptioProcessor", sets: Sequence[FairSet]) -> "BatchFeature":
    pictures = [draw_points(render_scene(item.seed).image, item.points, item.letters) for item in sets]
    questions = [ask("world-closest", options=named_letters(item.letters)) for item in sets]
    return encode_questions(processor, [Image.fromarray(picture) for picture in pictures], questions)


def _true_codes(model: "PerceptioForConditionalGeneration", sets: Sequence[FairSet]) -> Tensor:
    inverse = 1 / torch.from_numpy(np.stack([render_scene(item.seed).depth for item in sets]))
    far, near = inverse.amin((1, 2), keepdim=True), inverse.amax((1, 2), keepdim=True)
    return model.depth_model.encode((inverse - far) / (near - far))


def _replaced(
    own: Tensor, oracle: Tensor, replacements: Sequence[str], generator: torch.Generator
) -> dict[str, Tensor]:
    """(n, N) codes for each replacement."""
    drawn = torch.randint(oracle.numel(), own.shape, generator=generator)
    makers = {
        "own": lambda: own,
        "oracle": lambda: oracle,
        "random": lambda: oracle.flatten()[drawn],
        "other_image": lambda: own.roll(1 + len(own) // 2, 0),  # far off: neighbours share their places
        "first_repeat": lambda: own[:, :1].expand_as(own),
    }
    unknown = [name for name in replacements if name not in makers]
    if unknown:
        raise ValueError(f"Unknown replacements {unknown}; use {', '.join(makers)}.")
    return {name: makers[name]() for name in replacements}
