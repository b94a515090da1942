"""What a user types stays text, even where it is spelled like a token that means something: [SEG], <|im_end|>, <img>.

A tokenizer looks for such tokens in the rendered conversation, where nothing tells the user's words from the chat
template's. So a mark is put inside every token that it would find in the user's words, and the tokenizer drops the mark
again when it takes text apart: the token's letters are then read, and decoded, as any letters. The mark is two
invisible characters, so that a rendered conversation looks as it was typed, and is safe in front of a tokenizer that
does not drop it.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

MARK = "\u2060\u2063"  # word joiner, invisible separator; typed by a user, it is marked like a token
_MARKUP = re.compile(r"[<\[].*[>\]]", re.DOTALL)


def drop_marks(tokenizer) -> None:
    """Make a tokenizer split text at marks and drop them. Does nothing where it does so already.

    Raises:
        ValueError: for a tokenizer that is not one of the library `tokenizers`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"The tokenizer is a {type(tokenizer).__name__}; Perceptio needs a fast one, with a tokenizer.json, whose "
            "pre-tokenizer can be set."
        )
    from tokenizers import pre_tokenizers

    present = backend.pre_tokenizer
    if present is not None and _kept(present.pre_tokenize_str(f"a{MARK}b")) == 2:
        return
    split = pre_tokenizers.Split(MARK, "removed")
    backend.pre_tokenizer = split if present is None else pre_tokenizers.Sequence([split, present])


def control_ids(tokenizer) -> set[int]:
    """The tokens that no user may write: special ones, and all that look like <...> or [...].

    Other words that were added to a vocabulary are words like any other.
    """
    return {
        token
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.special or _MARKUP.fullmatch(added.content.strip())
    }


def structure_ids(tokenizer, chat_template: str, more: Iterable[str]) -> set[int]:
    """The special tokens that a conversation is built of: those of the chat template, of pictures (`more`), and those
    that begin, end and fill texts. The assistant's words do not hold them either."""
    ends = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, *more}
    return {
        token
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.special and (added.content in ends or added.content in chat_template)
    }


def mark_tokens(texts: Sequence[str], tokenizer, ids: set[int]) -> list[str]:
    """Mark every token of `ids` that the tokenizer finds in `texts`, also where it only forms from one to the next.

    Args:
        texts: the parts of one message, in order.
        tokenizer: one that went through `drop_marks`.

    Raises:
        ValueError: where the tokenizer finds such a token whatever is done, as in a character that it reads as one.
    """
    text = "".join(texts)
    cuts = {match.start() + 1 for match in re.finditer(MARK, text)}  # where marks are put
    while spans := _find(_marked(text, cuts), tokenizer, ids):
        more = {_cut(text, sorted(cuts), *span) for span in spans} - cuts
        if not more:
            raise ValueError(
                f"The tokenizer reads a token with a meaning of its own in the text {text[:100]!r}; take it out."
            )
        cuts |= more  # and look again: one token may hide another that overlaps it
    ends = list(accumulate(len(part) for part in texts))
    return [
        _marked(part, {cut - end + len(part) for cut in cuts if end - len(part) < cut <= end})
        for part, end in zip(texts, ends, strict=True)
    ]


def _find(text: str, tokenizer, ids: set[int]) -> list[tuple[int, int]]:
    """Where in `text` the tokenizer finds a token of `ids`."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, padding=False, truncation=False)
    return [span for token, span in zip(found["input_ids"], found["offset_mapping"], strict=True) if token in ids]


def _cut(text: str, cuts: list[int], start: int, end: int) -> int:
    """A place inside a token found from `start` to `end` of the marked text, as a place in the text itself."""
    before = sum(cut + len(MARK) * number < start for number, cut in enumerate(cuts))
    start, end = start - len(MARK) * before, end - len(MARK) * before
    blank = len(text[start:end]) - len(text[start:end].lstrip())  # some tokens take the space before them along
    return min(start + blank + 1, end - 1)


def _marked(text: str, cuts: set[int]) -> str:
    places = [0, *sorted(cuts), len(text)]
    return MARK.join(text[start:end] for start, end in pairwise(places))


def _kept(pieces: list[tuple[str, tuple[int, int]]]) -> int:
    """How many characters of a text are left in the pieces that a pre-tokenizer made of it."""
    return sum(end - start for _, (start, end) in pieces)
