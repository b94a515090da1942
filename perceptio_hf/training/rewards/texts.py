"""Rewards that are read off the words of a completion."""

import re
from collections.abc import Sequence
from typing import Any

from perceptio_hf.tokens import DEPTH_END_TOKEN, DEPTH_START_TOKEN, SEG_TOKEN

_CODE = re.compile(r"<DEPTH_(\d+)>")
_SPAN = re.compile(f"{DEPTH_START_TOKEN}((?:<DEPTH_\\d+>)*){DEPTH_END_TOKEN}")
_SPATIAL = re.compile(r"<DEPTH_(?:START|END|\d+)>|\[SEG\]")


def said(completion: Any) -> str:
    """The text of a completion, which TRL gives as words or as turns of the assistant."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def conclusion(text: str) -> str:
    """What an answer concludes: the words behind its last colon, without a final stop, or all of it."""
    return text.rsplit(":", 1)[-1].strip().rstrip(".").strip()


def without_spatial(text: str) -> str:
    """The words of a response."""
    return _SPATIAL.sub(" ", text).strip()


def spans_of(text: str) -> list[list[int]]:
    """The codes of every span that is closed."""
    return [[int(code) for code in _CODE.findall(match[1])] for match in _SPAN.finditer(text)]


def right_answer(completions: Sequence[Any], answer: Sequence[str | None], **columns: Any) -> list[float | None]:
    """1 where a completion concludes what the sample's answer concludes (`conclusion`), in any case of letters."""
    return [
        None if true is None else float(_concludes(said(completion)) == _concludes(true))
        for completion, true in zip(completions, answer, strict=True)
    ]


right_answer.needs = "answer"  # the column without which a sample gets no reward


def _concludes(text: str) -> str:
    return conclusion(without_spatial(text)).casefold()


class Form:
    """1 where a completion has the spatial tokens that its sample asks for, all spans whole, and words; else 0.

    Args:
        num_depth_tokens: N, codes of a span.
    """

    __name__ = "form"

    def __init__(self, num_depth_tokens: int):
        self.num_depth_tokens = num_depth_tokens

    def __call__(
        self, completions: Sequence[Any], spans: Sequence[int], segs: Sequence[int], **columns: Any
    ) -> list[float]:
        rows = zip(completions, spans, segs, strict=True)
        return [float(self._is_good(said(completion), *wanted)) for completion, *wanted in rows]

    def _is_good(self, text: str, spans: int, segs: int) -> bool:
        found = spans_of(text)
        stray = _SPATIAL.search(_SPAN.sub("", text).replace(SEG_TOKEN, ""))
        whole = all(len(codes) == self.num_depth_tokens for codes in found) and not stray
        return whole and len(found) == spans and text.count(SEG_TOKEN) == segs and bool(without_spatial(text))
