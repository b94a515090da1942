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
from transformers import DynamicCache

from ..data.world import draw_points, render_scene
from ..data.world.fair import FairSet
from .scenes import conclusion

if TYPE_CHECKING:
    from ..modeling.modeling_perceptio import PerceptioForConditionalGeneration
    from ..processing.processing_perceptio import PerceptioProcessor

REPLACEMENTS = ("own", "oracle", "random", "other_image", "first_repeat")
_ANSWER_TOKENS = 40


def closest_question(item: FairSet) -> str:
    """The question with its choices, as HardBLINK names them."""
    return f"Which is closest to the camera: {', '.join(item.letters[:-1])} or {item.letters[-1]}?"


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
        inputs = {name: value for name, value in inputs.items() if name != "mask_pixel_values"}
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
        inputs = _inputs(processor, chunk)
        prefix = model.model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values=inputs["pixel_values"],
            past_key_values=DynamicCache(),
        ).past_key_values
        for index, name in enumerate(replacements):
            ids = _answers_behind(model, prefix, inputs["attention_mask"], spans[name][start : start + batch_size])
            texts = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
            right[index] += sum(conclusion(text) == item.answer for text, item in zip(texts, chunk, strict=True))
    return {f"trt_{name}": float(value) / len(sets) for name, value in zip(replacements, right, strict=True)}


def _inputs(processor: "PerceptioProcessor", sets: Sequence[FairSet]) -> dict[str, Tensor]:
    chats = []
    for item in sets:
        picture = draw_points(render_scene(item.seed).image, item.points, item.letters)
        parts = [{"type": "image", "image": Image.fromarray(picture)}, {"type": "text", "text": closest_question(item)}]
        chats.append([{"role": "user", "content": parts}])
    return dict(
        processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    )


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


def _answers_behind(
    model: "PerceptioForConditionalGeneration", prefix: DynamicCache, mask: Tensor, codes: Tensor
) -> Tensor:
    """(n, t) greedy tokens behind spans of `codes` (n, N), which follow the cached prompts; no further spans."""
    words = model.spatial_vocabulary()
    count, ends = len(codes), torch.tensor(sorted(words.turn_ends))
    forbidden = torch.tensor([words.seg, words.depth_start, words.depth_end, *words.codes])
    column = torch.ones(count, 1, dtype=torch.long)
    ids = torch.cat([column * words.depth_start, torch.tensor(words.codes)[codes], column * words.depth_end], 1)
    cache = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in prefix.layers])
    written, done = [], torch.zeros(count, dtype=torch.bool)
    for _ in range(_ANSWER_TOKENS):
        mask = torch.cat([mask, mask.new_ones(count, ids.shape[1])], 1)
        hidden = model.model(input_ids=ids, attention_mask=mask, past_key_values=cache).last_hidden_state[:, -1]
        logits = model.lm_head(hidden)
        logits[:, forbidden] = -torch.inf
        ids = logits.argmax(-1, keepdim=True).masked_fill(done[:, None], int(ends[0]))
        done |= torch.isin(ids[:, 0], ends)
        written.append(ids)
        if done.all():
            break
    return torch.cat(written, 1)
