"""Which choice an answer in words takes, read by rule: a letter, or the text of exactly one choice.

Models answer "(A)", "B.", "Point B is closest", "the answer is C", or reason at length and conclude. The rules read all
of these, and nothing into "A point is ...", "A or B" or "I cannot tell".
"""

import re
import unicodedata
from collections.abc import Sequence

from .answer_statements import LETTERS, sentences, statements

MAX_CHOICES = len(LETTERS)


def answer_letter(text: str, num_choices: int = MAX_CHOICES) -> str | None:
    """The letter an answer takes.

    Read are a letter on its own ("(A)", "B.", "**C**", "option d"), a letter that leads ("A. The lamp"), "the answer is
    B" in its usual forms (the last one counts), and "point B is the closest" or "nearest" ("closer" too, unless only
    some of the others are named behind "than"). The reasoning around may name other letters. Contradictions, several
    letters at once, negations, conditions and questions give None.

    Args:
        text: What the model wrote; spatial tokens, tags and Markdown are skipped.
        num_choices: How many choices there were, 2 to 8; a letter beyond them gives None.

    Returns:
        "A" to "H", or None.

    Raises:
        ValueError: for another number of choices.
    """
    _check_count(num_choices)
    found = [item for sentence in sentences(text) for item in statements(sentence, num_choices)]
    if not found:
        return None
    strongest = [item for item in found if item.strength == max(item.strength for item in found)]
    last = strongest[-1]
    agree = len({item.letters for item in strongest}) == 1
    if not (agree or last.strength == 3 or last.concluding):
        return None
    return last.letters if last.letters in LETTERS[:num_choices] and len(last.letters) == 1 else None


def answer_choice(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice an answer takes: by `answer_letter`, else by the text of exactly one choice.

    A choice's text counts where it stands as whole words, in any case, except within a longer choice that is there too
    and behind "not".

    Args:
        text: What the model wrote.
        choices: The texts of the choices A, B, ..., 2 to 8.

    Returns:
        A letter, or None where neither rule finds exactly one.

    Raises:
        ValueError: for another number of choices.
    """
    letter = answer_letter(text, len(choices))
    if letter is not None:
        return letter
    said, wanted = _words(" ".join(sentences(text))), [_words(choice) for choice in choices]
    found = [index for index, words in enumerate(wanted) if words == said] or _named(said, wanted)
    return LETTERS[found[0]] if len(found) == 1 else None


def reference_letter(reference: str | int, num_choices: int = MAX_CHOICES) -> str:
    """The letter of a right answer: "B", "(B)", "b." or its index, counted from 0.

    Raises:
        ValueError: for anything else, and for a letter or index beyond the choices.
    """
    _check_count(num_choices)
    if isinstance(reference, str):
        match = re.fullmatch(r"\s*\(?([A-Za-z])[).]?\s*", reference)
        index = ord(match[1].upper()) - ord("A") if match else -1
    else:
        index = int(reference)
    if not 0 <= index < num_choices:
        raise ValueError(
            f"{reference!r} is no right answer among {num_choices} choices; "
            f"give A to {LETTERS[num_choices - 1]} or 0 to {num_choices - 1}."
        )
    return LETTERS[index]


def _check_count(num_choices: int) -> None:
    if not 2 <= num_choices <= MAX_CHOICES:
        raise ValueError(f"answers are read among 2 to {MAX_CHOICES} choices, not {num_choices}.")


def _words(text: str) -> str:
    """Lower case, single spaces, no punctuation except inside numbers; a space at both ends where there are words."""
    text = unicodedata.normalize("NFKC", str(text)).casefold()
    words = re.findall(r"\d+(?:[.,:/]\d+)*|[^\W\d_]+(?:'[^\W\d_]+)?", text)
    return f" {' '.join(words)} " if words else ""


def _named(said: str, wanted: Sequence[str]) -> list[int]:
    """Indices of the choices named in `said`; longer ones are looked for first and taken out."""
    found = []
    for index in sorted(range(len(wanted)), key=lambda index: -len(wanted[index])):
        pattern = re.compile(rf"(?<! not)(?<! not a)(?<! not the){re.escape(wanted[index])}")
        if wanted[index] and pattern.search(said):
            found.append(index)
            if sum(words == wanted[index] for words in wanted) == 1:
                said = pattern.sub(" | ", said)
    return found
