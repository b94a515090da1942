"""Which choice an answer in words takes, read by rule: a letter, or the text of exactly one choice.

Models answer "(A)", "B.", "Point B is closest", "the answer is C", or reason at length and conclude. The rules read all
of these, and nothing into "A point is ...", "A or B" or "I cannot tell".
"""

import re
import unicodedata
from collections.abc import Sequence

from .answer_chinese import in_english
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
    found = [item for sentence in sentences(in_english(text)) for item in statements(sentence, num_choices)]
    if not found:
        return None
    strongest = [item for item in found if item.strength == max(item.strength for item in found)]
    last = strongest[-1]
    agree = len({item.letters for item in strongest}) == 1
    if not (agree or last.strength == 3 or last.concluding):
        return None
    return last.letters if last.letters in LETTERS[:num_choices] and len(last.letters) == 1 else None


def answer_choice(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice an answer takes: by exactly a choice's text, by `answer_letter`, or by the text of
    exactly one choice within it.

    A choice's text counts where it stands as whole words, in any case, except within a longer choice that is there too
    and behind "not", "no", "neither" or "without"; "yes" and "no" count where they answer, not in "there is no cat".
    Sentences that say that nothing can be said name no choice. Letters in such a text, as in "Figure B", name nothing
    by themselves. An answer that is nothing but a letter names the choice of that letter, even where a choice's text is
    a letter: that is what is asked for.

    Args:
        text: What the model wrote.
        choices: The texts of the choices A, B, ..., 2 to 8; an empty one can only be taken by its letter.

    Returns:
        A letter, or None where neither rule finds exactly one.

    Raises:
        ValueError: for another number of choices.
    """
    _check_count(len(choices))
    exact = [index for index, choice in enumerate(choices) if _plain(choice) and _plain(choice) == _plain(text)]
    if len(exact) == 1 and not _is_letter(text):
        return LETTERS[exact[0]]
    letter = answer_letter(_without_lettered(text, choices), len(choices))
    if letter is not None:
        return letter
    asserted = [sentence for sentence in sentences(_normal(text)) if not _REFUSAL.search(sentence)]
    wanted = [_words(choice) for choice in choices]
    if {" yes ", " no "} & {*wanted}:
        asserted = [_NO_ANSWER.sub(" ", sentence) for sentence in asserted]
    said = _words(" ".join(asserted))
    found = [index for index, words in enumerate(wanted) if words and words == said] or _named(said, wanted)
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


def _plain(text: str) -> str:
    """In small letters with single spaces, without full stops at the end."""
    return " ".join(_normal(text).casefold().split()).rstrip(".!。 ")


def _is_letter(text: str) -> bool:
    return re.fullmatch(r"""[\s("'*\[]*[A-Za-z][\s)"'*.:\]]*""", text) is not None


def _without_lettered(text: str, choices: Sequence[str]) -> str:
    """`text` with "it" in the place of those choices that hold a letter beside other words: in "Figure B" the letter
    belongs to the text and names no choice."""
    lettered = [choice for choice in choices if re.search(r"\b[A-Ha-h]\b", choice) and not _is_letter(choice)]
    for choice in sorted(lettered, key=len, reverse=True):
        words = r"\s+".join(map(re.escape, choice.split()))
        text = re.sub(rf"(?<!\w){words}(?!\w)", "it", text, flags=re.IGNORECASE)
    return text


_REFUSAL = re.compile(
    r"\b(?:can(?:not|['’]t| not)\s+(?:be\s+)?(?:tell|told|say|said|see|determined?|decided?|answer(?:ed)?|know|judged?)"
    r"|(?:do(?:n['’]t| not)|not)\s+know|unable|impossible|uncertain|unsure|unclear|no\s+way|whether"
    r"|not\s+(?:sure|possible|clear|certain))\b",
    re.IGNORECASE,
)
# "yes" and "no" that do not answer: neither at the beginning and before a break, nor behind what announces them.
_NO_ANSWER = re.compile(
    r"(?<!^)(?<!answer is )(?<!\bsay )(?<!: )(?<!, )(?<!\bso )\b(?:yes|no)\b"
    r"|^(?:yes|no)\b(?!\W*$|\s*[,.;:!–—-]|\s+(?:it|they|he|she|there|this|that|these|those|the|i|you|we)\b)",
    re.IGNORECASE,
)
# -3, 0.5, 1,000, 1/2, 10:30, 2-3 and 10^3 are one word each; "12cm" is two, "H2O" one.
_WORD = re.compile(r"-?\d+(?:[.,:/^+-]\d+)*|[^\W\d_]+(?:'[^\W\d_]+|\d\w*)?")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")


def _normal(text: str) -> str:
    """One form for each sign; 10³ becomes 10^3 (and not 103), ½ becomes 1/2, every minus a hyphen."""
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda match: f"^{match[0].translate(_SUPERSCRIPTS)}", str(text))
    return re.sub("[−–]", "-", unicodedata.normalize("NFKC", text).replace("⁄", "/"))


def _words(text: str) -> str:
    """Lower case, single spaces, no punctuation except inside numbers; a space at both ends where there are words."""
    text = re.sub(r"n[’']t\b", " not", _normal(text).casefold())
    text = re.sub(r"(?<!\d )\b(?:minus|negative)\s+(?=\d)", "-", text)
    text = re.sub(r"(?<![\w.])\.(?=\d)", "0.", text)  # .5
    text = re.sub(r"(?<=\d)\s*([+-])\s*(?=\d)", r"\1", text)  # 5 - 3
    text = re.sub(r"(?<=[\w)\]])\s*-(?!\d)|(?<=[^\W\d])-(?=\d)|(?<=[)\]])-", " ", text)  # no sign: "F-16"
    words = _WORD.findall(text)
    return f" {' '.join(words)} " if words else ""


_NEGATIONS, _ARTICLES = ("not", "no", "neither", "nor", "without"), ("", " a", " an", " the")
_NOT_BEHIND = "".join(f"(?<! {word}{article})" for word in _NEGATIONS for article in _ARTICLES)


def _named(said: str, wanted: Sequence[str]) -> list[int]:
    """Indices of the choices named in `said`; longer ones are looked for first and taken out."""
    found = []
    for index in sorted(range(len(wanted)), key=lambda index: -len(wanted[index])):
        pattern = re.compile(_NOT_BEHIND + re.escape(wanted[index]))
        if wanted[index] and pattern.search(said):
            found.append(index)
            if sum(words == wanted[index] for words in wanted) == 1:
                said = pattern.sub(" | ", said)
    return found
