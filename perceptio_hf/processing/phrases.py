"""Which words of a response each of its [SEG] was written for."""

import re
from collections.abc import Sequence

from perceptio_hf.tokens import PICTURE_MARK

_TAGS = re.compile(r"</?p>")  # Sa2VA and GLaMM write <p> the cat </p> [SEG]
_TAGGED = re.compile(r"<p>((?:(?!</?p>).)*)</p>\W*$", re.DOTALL)
_CLAUSE_END = re.compile(r"[.!?;,:](?=\s|$)|\n|[。！？；，、：]")
_FIRST = re.compile(r"^(?:\d+[.)]|and|or|then|also|&)\s+", re.IGNORECASE)
_NO_NAME = re.compile(r"(?:(?:^|\W)(?:is|are|was|were)|['’]s|^(?:sure|yes|ok|okay|here|there))$", re.IGNORECASE)
_AROUND = " \t\r\"'`“”‘’()[]{}<>*_#-–—:"


def phrases_of(texts: Sequence[str]) -> list[str | None]:
    """The phrase of each [SEG].

    It is what stands in ``<p> ... </p>`` right before the [SEG]; or else the words before it, back to the clause's
    beginning or the [SEG] before: "the cat [SEG] and the dog [SEG]" speaks of "the cat" and "the dog". A [SEG] right
    behind another one has the same phrase. Words that name nothing ("It is [SEG].", "Sure, [SEG].") are no phrase.

    Args:
        texts: for each [SEG] the words since the one before, with a line end where a depth span stood.
    """
    phrases: list[str | None] = []
    for text in texts:
        beside = "\n" not in text and text.strip(" ,;&").lower() in ("", "and", "or")
        phrases.append(phrases[-1] if beside and phrases else _phrase(text))
    return phrases


def without_tags(text: str) -> str:
    """`text` without the tags around phrases."""
    return _TAGS.sub("", text)


def _phrase(text: str) -> str | None:
    tagged = _TAGGED.search(text)
    if tagged:
        return " ".join(tagged[1].split()) or None
    marks = list(PICTURE_MARK.finditer(text))
    text = without_tags(text[marks[-1].end() :] if marks else text)
    clause = _CLAUSE_END.split(text.rstrip(_AROUND))[-1]
    words = _FIRST.sub("", " ".join(clause.strip(_AROUND).split())).strip(_AROUND)
    return None if not words or _NO_NAME.search(words) else words
