"""The words of a response, and which of them each [SEG] was written for."""

import re
from collections.abc import Iterable, Sequence

from perceptio_hf.tokens import PICTURE_MARK

_TAGS = re.compile(r"( *)</?p>( *)")  # Sa2VA and GLaMM write <p> the cat </p> [SEG]
_TAGGED = re.compile(r"<p>((?:(?!</?p>).)*)</p>\W*$", re.DOTALL)
_CLAUSE_END = re.compile(r"[.!?;,:](?=\s|$)|\n|[。！？；，、：]")
_FIRST = re.compile(r"^(?:\d+[.)]|and|or|then|also|&)\s+", re.IGNORECASE)
_NO_NAME = re.compile(r"(?:(?:^|\W)(?:is|are|was|were)|['’]s|^(?:sure|yes|ok|okay|here|there))$", re.IGNORECASE)
_NO_BLANKS = 0x2E80  # from here on stand scripts whose words have none between them
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
    """`text` without the tags around phrases; where blanks stood on both sides of one, one is left."""
    return _TAGS.sub(lambda tag: " " if tag[1] and tag[2] else tag[1] + tag[2], text)


def joined(pieces: Iterable[str]) -> str:
    """What stood between spatial tokens, without these: where both neighbours had a blank one is left, and words that
    only a token kept apart, as in "It is [SEG].<DEPTH_START>...<DEPTH_END>The cat", get one."""
    text = ""
    for piece in pieces:
        if text.endswith(" ") and piece.startswith(" "):
            text, piece = text.rstrip(" ") + " ", piece.lstrip(" ")
        elif text and piece and _may_end_a_word(text[-1]) and piece[0].isalnum() and ord(piece[0]) < _NO_BLANKS:
            text += " "
        text += piece
    return text


def _may_end_a_word(character: str) -> bool:
    return (character.isalnum() and ord(character) < _NO_BLANKS) or character in ".,;:!?)]}\"'"


def _phrase(text: str) -> str | None:
    tagged = _TAGGED.search(text)
    if tagged:
        return " ".join(tagged[1].split()) or None
    marks = list(PICTURE_MARK.finditer(text))
    text = without_tags(text[marks[-1].end() :] if marks else text)
    clause = _CLAUSE_END.split(text.rstrip(_AROUND))[-1]
    words = _FIRST.sub("", " ".join(clause.strip(_AROUND).split())).strip(_AROUND)
    return None if not words or _NO_NAME.search(words) else words
