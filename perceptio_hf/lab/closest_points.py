"""Which marked point is the nearest: asked without shortcuts, and with the depth span replaced before the answer."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from perceptio_hf.evaluation.benchmarks.prompts import ask, named_letters
from perceptio_hf.evaluation.replacement.token_replacement import answers_with_codes, replaced_codes
from perceptio_hf.evaluation.run.answering import encode_questions, token_budget
from perceptio_hf.world import draw_points, render_scene
from perceptio_hf.world.fair import FairSet

from .held_out import conclusion

if TYPE_CHECKING:
    from transformers import BatchFeature

    from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
    from perceptio_hf.processing.processing_perceptio import PerceptioProcessor

# Names of the ablation's figures -> names of the Token Replacement Test in `evaluation.replacement`.
REPLACEMENTS = {
    "own": "identity",
    "oracle": "oracle",
    "random": "random",
    "other_image": "other-image",
    "first_repeat": "first-repeat",
}


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
        inputs = _inputs(processor, sets[start : start + batch_size]).to(model.device)
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
    replacements: Sequence[str] = tuple(REPLACEMENTS),
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, float]:
    """Accuracy on `sets` with the span's codes replaced; every picture is encoded once for all replacements.

    Args:
        own: (n, N) codes of the model's own spans.
        replacements: of `REPLACEMENTS`, whose values are the names and meanings in `evaluation.replacement`.

    Returns:
        `trt_REPLACEMENT` for each.

    Raises:
        ValueError: for an unknown replacement.
    """
    unknown = [name for name in replacements if name not in REPLACEMENTS]
    if unknown:
        raise ValueError(f"Unknown replacements {unknown}; use {', '.join(REPLACEMENTS)}.")
    spans = replaced_codes(
        [REPLACEMENTS[name] for name in replacements], own.numpy(), [str(item.seed) for item in sets], seed=seed
    )
    right = dict.fromkeys(replacements, 0)
    for start in progress(range(0, len(sets), batch_size)):
        chunk = sets[start : start + batch_size]
        codes = {name: spans[REPLACEMENTS[name]][start:][:batch_size] for name in replacements if name != "oracle"}
        if "oracle" in replacements:
            codes["oracle"] = _true_codes(model, chunk).cpu().numpy()
        texts = answers_with_codes(
            model,
            processor,
            _inputs(processor, chunk).to(model.device),
            [[]] * len(chunk),
            codes,
            spatial="depth",
            max_new_tokens=token_budget(model),
        )
        for name in replacements:
            right[name] += sum(conclusion(text) == item.answer for text, item in zip(texts[name], chunk, strict=True))
    return {f"trt_{name}": count / len(sets) for name, count in right.items()}


def _inputs(processor: "PerceptioProcessor", sets: Sequence[FairSet]) -> "BatchFeature":
    pictures = [draw_points(render_scene(item.seed).image, item.points, item.letters) for item in sets]
    questions = [ask("world-closest", options=named_letters(item.letters)) for item in sets]
    return encode_questions(processor, [Image.fromarray(picture) for picture in pictures], questions)


def _true_codes(model: "PerceptioForConditionalGeneration", sets: Sequence[FairSet]) -> Tensor:
    inverse = 1 / torch.from_numpy(np.stack([render_scene(item.seed).depth for item in sets]))
    far, near = inverse.amin((1, 2), keepdim=True), inverse.amax((1, 2), keepdim=True)
    return model.depth_model.encode(((inverse - far) / (near - far)).to(model.depth_model.device))
