"""The Token Replacement Test: do the answers rest on what the depth span says, or only on its being there?

The prompt, the picture, the number of tokens and the decoding stay; the codes of the model's own span change before the
answer is generated. If the answers do not change with them, they never rested on the span (Zhang, Bigverdi, Krishna,
"Ablate-to-Validate"; after AURORA's question whether depth tokens are used).
"""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import BatchFeature, GenerationMixin

from perceptio_hf.modeling.modeling_perceptio import CACHE
from perceptio_hf.modeling.span_grammar import SpanGrammar
from perceptio_hf.modeling.spans.spatial_output import SpatialOutput

if TYPE_CHECKING:
    from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
    from perceptio_hf.processing.processing_perceptio import PerceptioProcessor

# Name -> what takes the place of the codes; printed beside the results.
REPLACEMENTS = {
    "identity": "the model's own codes once more: shows that putting codes in place changes nothing by itself",
    "oracle": "the codes of the true depth",
    "random": "every code drawn by itself, as often as it occurs in all own spans of the run",
    "random-matched": "the sample's own codes in a random order",
    "other-image": "the whole own span of another picture",
    "first-repeat": "the sample's own first code everywhere",
    "constant": "one code everywhere: the most frequent one of all own spans of the run",
}


def check_replacements(names: Sequence[str]) -> tuple[str, ...]:
    """The names of replacements, identity first, since all others are compared with it; no name twice.

    Raises:
        ValueError: for a name that is unknown.
    """
    unknown = [name for name in names if name not in REPLACEMENTS]
    if unknown:
        raise ValueError(f"There is no replacement {unknown[0]!r}; choose from {', '.join(REPLACEMENTS)}.")
    return tuple(dict.fromkeys(("identity", *names)))


def replaced_codes(
    names: Sequence[str], own: np.ndarray, pictures: Sequence[str], *, seed: int = 0
) -> dict[str, np.ndarray]:
    """The codes that take the place of the own ones.

    What a sample gets depends on its place in the run, never on batches: resumed runs draw the same.

    Args:
        names: of `REPLACEMENTS`; "oracle" is left out here, it rests on depth (see `oracle`).
        own: (n, N) integers, the codes of the model's own spans.
        pictures: n names; samples of one name show the same picture.
        seed: of what is drawn.

    Returns:
        {name: (n, N)}.

    Raises:
        ValueError: for an unknown name, or "other-image" where more than half of the samples show one picture.
    """
    makers = {
        "identity": lambda: own,
        "random": lambda: _drawn(own, seed),
        "random-matched": lambda: _shuffled(own, seed),
        "other-image": lambda: own[_others(pictures)],
        "first-repeat": lambda: np.repeat(own[:, :1], own.shape[1], axis=1),
        "constant": lambda: np.full_like(own, np.bincount(own.ravel()).argmax()),
    }
    return {name: makers[name]() for name in check_replacements(names) if name != "oracle"}


def _drawn(own: np.ndarray, seed: int) -> np.ndarray:
    counts = np.bincount(own.ravel())
    rows = [
        np.random.default_rng([seed, index]).choice(len(counts), own.shape[1], p=counts / counts.sum())
        for index in range(len(own))
    ]
    return np.stack(rows)


def _shuffled(own: np.ndarray, seed: int) -> np.ndarray:
    rows = [np.random.default_rng([seed, index]).permutation(codes) for index, codes in enumerate(own)]
    return np.stack(rows)


def lacks_pictures(pictures: Sequence[str]) -> str | None:
    """Why the spans of these samples cannot be exchanged between pictures, None where they can."""
    most, count = max(Counter(pictures).values()), len(pictures)
    if most <= count // 2:
        return None
    return f"{most} of {count} samples with a span show the same picture; it needs spans of more pictures."


def _others(pictures: Sequence[str]) -> np.ndarray:
    """(n,) for every sample the index of one with another picture; each index occurs once.

    With samples of a picture side by side, a shift by half of them leads from every picture to another one, unless a
    picture fills more than half.
    """
    lacking, count = lacks_pictures(pictures), len(pictures)
    if lacking:
        raise ValueError(f"the replacement `other-image` cannot be had: {lacking}")
    first: dict[str, int] = {}
    for index, picture in enumerate(pictures):
        first.setdefault(picture, index)
    order = np.array(sorted(range(count), key=lambda index: (first[pictures[index]], index)))
    others = np.empty(count, dtype=np.int64)
    others[order] = np.roll(order, -(count // 2))
    return others


@torch.no_grad()
def answers_with_codes(
    model: "PerceptioForConditionalGeneration",
    processor: "PerceptioProcessor",
    inputs: BatchFeature,
    starts: Sequence[Sequence[int]],
    codes: Mapping[str, np.ndarray],
    *,
    spatial: str,
    max_new_tokens: int,
) -> dict[str, list[str]]:
    """The words that follow when other codes stand in the spans; prompts and pictures are computed once for all.

    Args:
        inputs: n prompts with one picture each, padded on the left.
        starts: for each the ids that the model wrote in front of its span.
        codes: {name: (n, N)}.
        spatial, max_new_tokens: as in the generation of the own answers.

    Returns:
        {name: n texts}.
    """
    cache = _prompt_cache(model, inputs)
    texts = {name: [""] * len(starts) for name in codes}
    # Rows whose spans begin at the same place go on together, so that no padding comes between prompt and answer.
    for length in sorted(set(map(len, starts))):
        rows = [row for row, start in enumerate(starts) if len(start) == length]
        for name, table in codes.items():
            begun = _begun(model, [starts[row] for row in rows], table[rows])
            found = _continued(model, processor, inputs, cache, rows, begun, spatial, max_new_tokens)
            for row, text in zip(rows, found, strict=True):
                texts[name][row] = text
    return texts


def _prompt_cache(model: "PerceptioForConditionalGeneration", inputs: BatchFeature):
    """Keys and values of the prompts: transformers' own generation, stopped after its first step."""
    out = GenerationMixin.generate(
        model,
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        pixel_values=inputs["pixel_values"],
        do_sample=False,
        max_new_tokens=1,
        return_dict_in_generate=True,
    )
    return out[CACHE]


def _begun(
    model: "PerceptioForConditionalGeneration", starts: Sequence[Sequence[int]], codes: np.ndarray
) -> torch.Tensor:
    """(n, tokens) responses up to the end of their spans."""
    words = model.spatial_vocabulary()
    spans = [[words.depth_start, *(words.codes[code] for code in row), words.depth_end] for row in codes.tolist()]
    return torch.tensor([[*start, *span] for start, span in zip(starts, spans, strict=True)], device=model.device)


def _continued(
    model: "PerceptioForConditionalGeneration",
    processor: "PerceptioProcessor",
    inputs: BatchFeature,
    cache,
    rows: list[int],
    begun: torch.Tensor,
    spatial: str,
    max_new_tokens: int,
) -> list[str]:
    """Texts behind `begun` (rows, tokens), under the grammar that the own answers were generated with."""
    prompt_length = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"][rows], begun], dim=1)
    mask = torch.cat([inputs["attention_mask"][rows], torch.ones_like(begun)], dim=1)
    if begun.shape[1] < max_new_tokens:
        past = copy.deepcopy(cache)
        past.batch_select_indices(torch.tensor(rows, device=ids.device))
        grammar = SpanGrammar(
            model.spatial_vocabulary(),
            spatial=spatial,
            prompt_length=prompt_length,
            max_length=prompt_length + max_new_tokens,
            num_pictures=torch.ones(len(rows), dtype=torch.long),
            open_codes=torch.full((len(rows),), -1),
        )
        ids = GenerationMixin.generate(
            model,
            input_ids=ids,
            attention_mask=mask,
            **{CACHE: past},
            logits_processor=[grammar],
            do_sample=False,
            max_new_tokens=max_new_tokens - begun.shape[1],
        )
    return _texts(processor, ids, prompt_length)


def _texts(processor: "PerceptioProcessor", sequences: torch.Tensor, prompt_length: int) -> list[str]:
    """The words of responses, made exactly as those of own answers are."""
    none = [[] for _ in sequences]
    words_only = SpatialOutput(
        sequences=sequences,
        prompt_length=prompt_length,
        mask_pictures=none,
        depth_pictures=none,
        well_formed=[True] * len(none),
    )
    return [answer.text for answer in processor.post_process_spatial(words_only)]
