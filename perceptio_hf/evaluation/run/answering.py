"""Questions about pictures, answered a batch at a time, greedily.

The answer to a question does not depend on the others of its batch: prompts are padded on the left, padding is masked
and positions count from each prompt's own start, so that every row is computed from its own tokens alone. What remains
is rounding, since matrix products of another size may add in another order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perceptio_hf.data.run_length import encode_mask
from perceptio_hf.tokens import SpatialVocabulary, read_sequence

if TYPE_CHECKING:
    from PIL import Image
    from transformers import BatchFeature

    from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
    from perceptio_hf.processing.processing_perceptio import PerceptioProcessor, SpatialAnswer

_ANSWER_TOKENS = 128  # beyond the spans, where neither the caller nor the checkpoint sets a limit


@dataclass(frozen=True)
class Response:
    """An answer, and the ids of the tokens in front of its depth span; None where it has no span."""

    answer: "SpatialAnswer"
    before_depth: list[int] | None


def encode_questions(
    processor: "PerceptioProcessor", pictures: "Sequence[Image.Image]", questions: Sequence[str]
) -> "BatchFeature":
    """One question about each picture as inputs of `model.generate`, padded on the left.

    Raises:
        ValueError: for an empty question.
    """
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
        for picture, question in zip(pictures, questions, strict=True)
    ]
    return encode_chats(processor, chats)


def encode_chats(processor: "PerceptioProcessor", chats: Sequence[Sequence[dict]]) -> "BatchFeature":
    """Conversations that wait for an answer as inputs of `model.generate`, padded on the left.

    Raises:
        ValueError: for a user's turn without words.
    """
    return processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )


def token_budget(model: "PerceptioForConditionalGeneration", asked: int | None = None) -> int:
    """New tokens an answer about one picture may have, spans included: as asked, else the checkpoint's own limit, else
    a [SEG], a depth span and 128 more."""
    own = model.generation_config.max_new_tokens
    return asked or own or _ANSWER_TOKENS + model.config.num_depth_tokens + 3


def answer_questions(
    model: "PerceptioForConditionalGeneration",
    processor: "PerceptioProcessor",
    pictures: "Sequence[Image.Image]",
    questions: Sequence[str],
    *,
    spatial: str,
    max_new_tokens: int,
    masks: bool = True,
) -> list[Response]:
    """One question about each picture, as one batch.

    Args:
        spatial: as in `model.generate`.
        max_new_tokens: longest answer in tokens.
        masks: whether masks are made; without them SAM2 does not run.

    Raises:
        ValueError: for an empty question, where `max_new_tokens` is too small for the spans `spatial` forces, or a
            model without spatial tokens.
    """
    words = model.spatial_vocabulary()
    inputs = encode_questions(processor, pictures, questions).to(model.device)
    if not masks and spatial in ("auto", "none", "depth"):  # forced [SEG] insist on their pictures
        inputs.pop("mask_pixel_values", None)
    one = {"do_sample": False, "num_return_sequences": 1}  # whatever the checkpoint's own settings are
    out = model.generate(**inputs, **one, spatial=spatial, max_new_tokens=max_new_tokens, return_dict_in_generate=True)
    answers = processor.post_process_spatial(out)
    return [
        Response(answer, _before_depth(row, out.prompt_length, words))
        for answer, row in zip(answers, out.sequences.tolist(), strict=True)
    ]


def describe(answer: "SpatialAnswer") -> dict:
    """What an answer says, for JSON: words, masks as COCO run lengths and what they are of, depth as its codes."""
    return {
        "text": answer.text,
        "masks": [encode_mask(mask) for mask in answer.masks],
        "phrases": answer.phrases,
        "mask_scores": [round(float(score), 4) for score in answer.mask_scores],
        "depth_codes": answer.depth_codes,
        "well_formed": answer.well_formed,
    }


def _before_depth(row: list[int], prompt_length: int, words: SpatialVocabulary) -> list[int] | None:
    spans = read_sequence(row, words, prompt_length).spans
    return row[prompt_length : spans[0].position] if spans else None
