"""Do depth spans hold together by themselves, where no grammar holds them?"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationMixin

from perceptio_hf.tokens import read_sequence

if TYPE_CHECKING:
    from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration


@torch.no_grad()
def sample_spans(
    model: "PerceptioForConditionalGeneration", batches: Iterable[Mapping[str, Tensor]], *, seed: int = 0
) -> dict[str, float]:
    """Sample responses to questions about depth at temperature 1 by transformers' own `generate`, without our grammar,
    at most twice as long as a span.

    Args:
        batches: inputs of `generate`, padded on the left.

    Returns:
        "malformed_rate": share of responses with a broken span, with several or with none. "count_mae": mean distance
        between the number of codes in a response and that of a span.
    """
    words = model.spatial_vocabulary()
    codes = torch.tensor(words.codes, device=model.device)
    count = broken = off = 0
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # a training's own numbers stay what they would have been
        torch.manual_seed(seed)
        for inputs in batches:
            prompt_length = inputs["input_ids"].shape[1]
            ids = GenerationMixin.generate(
                model,
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                pixel_values=inputs["pixel_values"],
                do_sample=True,
                temperature=1.0,  # whatever the model's own settings are
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                max_new_tokens=2 * words.span_length,
            )
            read = [read_sequence(row, words, prompt_length) for row in ids.tolist()]
            count += len(read)
            broken += sum(not row.well_formed or len(row.spans) != 1 for row in read)
            written = torch.isin(ids[:, prompt_length:], codes).sum(1)
            off += int((written - words.num_depth_tokens).abs().sum())
    return {"malformed_rate": broken / count, "count_mae": off / count}
