"""Answers that another engine gave, as lines of JSON: read, checked, and turned into masks and depth by one pass."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from perceptio_hf.conversion.engine_grammars import forbidden_ids
from perceptio_hf.files import expanded
from perceptio_hf.tokens import spatial_tokens

from .answering import encode_chats

if TYPE_CHECKING:
    from PIL import Image

    from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
    from perceptio_hf.processing.processing_perceptio import PerceptioProcessor, SpatialAnswer

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)


@dataclass(frozen=True)
class EngineAnswer:
    """One line: what was shown and asked, and the ids of the answer up to the end of the turn.

    Args:
        line: its number, from 1.
        pictures: files or addresses, in the order they were shown.
        question: what the user asked behind them.
        ids: of the answer.
    """

    line: int
    pictures: tuple[str, ...]
    question: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Refused:
    """A line that cannot be decoded, and why."""

    line: int
    reason: str


class AnswerReader:
    """Reads lines into ids of one checkpoint's vocabulary.

    Args:
        model, processor: the checkpoint that the engine's export came from.
        folder: where pictures with relative paths are looked for.

    Raises:
        ValueError: for a model without spatial tokens.
    """

    def __init__(self, model: "PerceptioForConditionalGeneration", processor: "PerceptioProcessor", folder: str | Path):
        self.tokenizer, self.folder = processor.tokenizer, Path(folder)
        self.words = model.spatial_vocabulary()
        self.rows = model.config.text_config.vocab_size
        self.forbidden = forbidden_ids(model, processor)
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        unspoken = sorted({*special, *spatial_tokens(len(self.words.codes))}, key=len, reverse=True)
        self.unspoken = re.compile("|".join(map(re.escape, unspoken)) + r"|\s+")

    def read(self, lines: Iterable[bytes]) -> list[EngineAnswer | Refused]:
        """What is in the lines, in their order; empty ones are left out."""
        found: list[EngineAnswer | Refused] = []
        for number, line in enumerate(lines, start=1):
            if line.strip(b" \t\r\n\xef\xbb\xbf"):
                try:
                    found.append(self._answer(number, _parsed(line)))
                except ValueError as error:
                    found.append(Refused(number, str(error)))
        return found

    def _answer(self, number: int, values: dict[str, Any]) -> EngineAnswer:
        pictures = values.get("pictures", [values["picture"]] if "picture" in values else None)
        if (
            not isinstance(pictures, list)
            or not pictures
            or not all(isinstance(item, str) and item for item in pictures)
        ):
            raise ValueError("it has no `picture` (a path or address), and no `pictures` (a list of them).")
        question = values.get("question")
        if not isinstance(question, str) or not question.strip():
            raise ValueError("it has no `question`; masks and depth are read behind the words that were asked.")
        located = (item if _ADDRESS.match(item) else str(self.folder / expanded(item)) for item in pictures)
        return EngineAnswer(number, tuple(located), question, tuple(self._ids(values)))

    def _ids(self, values: dict[str, Any]) -> list[int]:
        text, ids = values.get("text"), values.get("token_ids")
        if ids is None:
            if not isinstance(text, str):
                raise ValueError("it has neither `token_ids` (a list of integers) nor `text`.")
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        elif not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise ValueError("`token_ids` is no list of integers.")
        end = next((place for place, token in enumerate(ids) if token in self.words.turn_ends), len(ids))
        ids = ids[:end]  # engines that fill rows up do so behind the end
        self._check(ids)
        if values.get("token_ids") is not None and isinstance(text, str) and self._spoken(ids) != self._strip(text):
            raise ValueError(
                f"`token_ids` spell {self.tokenizer.decode(ids)[:60]!r} and `text` is {text[:60]!r}: these ids are of "
                "another vocabulary."
            )
        return ids

    def _check(self, ids: Sequence[int]) -> None:
        """Raises ValueError for ids that no response of this checkpoint holds."""
        for token in ids:
            if not 0 <= token < self.rows:
                raise ValueError(
                    f"it has the id {token}, but the vocabulary has {self.rows} rows: these ids are of another "
                    "vocabulary; name the checkpoint that was exported with --model."
                )
            if token in self.forbidden:
                name = self.tokenizer.convert_ids_to_tokens(token)
                raise ValueError(
                    f"it has the id {token} ({name or 'a row without a token'}), which no answer holds. Are these ids "
                    "of another vocabulary, or is the prompt among them?"
                )

    def _spoken(self, ids: Sequence[int]) -> str:
        return self._strip(self.tokenizer.decode(ids, skip_special_tokens=False))

    def _strip(self, text: str) -> str:
        """The words, without spaces and without tokens that an engine may leave out of its text."""
        return self.unspoken.sub("", text)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
        json.dumps(values, ensure_ascii=False).encode("utf-8")  # a result can hold it
    except UnicodeError as error:
        raise ValueError(f"it is not text in UTF-8 ({error.reason}).") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error}); write one object per line.") from None
    if not isinstance(values, dict):
        raise ValueError(f"it is a {type(values).__name__}; write an object with `picture`, `question` and `text`.")
    return values


def decode_answers(
    model: "PerceptioForConditionalGeneration",
    processor: "PerceptioProcessor",
    answers: Sequence[EngineAnswer],
    pictures: "Sequence[Sequence[Image.Image]]",
) -> "list[SpatialAnswer]":
    """Masks and depth of a batch of answers, by one forward pass over prompts and answers.

    Args:
        pictures: of each answer, opened.

    Returns:
        One for each answer; `well_formed` is False where a span is broken.
    """
    chats = [
        [{"role": "user", "content": [*({"type": "image", "image": item} for item in shown), _text(answer.question)]}]
        for answer, shown in zip(answers, pictures, strict=True)
    ]
    inputs = encode_chats(processor, chats).to(model.device)
    longest = max(len(answer.ids) for answer in answers)
    # Behind an answer the filling is read by nothing.
    filled = [[*answer.ids, *[processor.tokenizer.pad_token_id] * (longest - len(answer.ids))] for answer in answers]
    responses = torch.tensor(filled, dtype=torch.long, device=inputs["input_ids"].device)
    outputs = model.decode_spatial(torch.cat([inputs["input_ids"], responses], dim=1), **inputs)
    return processor.post_process_spatial(outputs)


def _text(question: str) -> dict[str, str]:
    return {"type": "text", "text": question}
