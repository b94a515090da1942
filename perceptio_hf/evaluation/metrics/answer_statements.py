"""What the sentences of an answer state about the letters of the choices.

A letter that names a choice is marked: "point B" becomes <B>, letters named together ("A, B or C") become <ABC>. Every
clause is then searched for statements about marked letters. The rules are English and know two kinds of questions:
which choice is right, and which point is closest.
"""

import re
import unicodedata
from typing import NamedTuple

LETTERS = "ABCDEFGH"  # the next one would be the pronoun I


class Statement(NamedTuple):
    """strength: 3 "the answer is B", 2 "B is closest" or "B" alone, 1 "B is closer"; letters: one, or all together."""

    strength: int
    letters: str
    concluding: bool


_VERBS = (
    "is|are|was|be|being|looks?|appears?|seems?|lies|sits|stands|comes|has|have|would|must|should|could|might|may|"
    "remains"
)
_VERB = rf"\b(?:{_VERBS})\b"
_NAME = (
    r"(?:(?:the|red|points?|circles?|dot|spot|marker|box|object|image|figure|picture|option|choice|letter|label|"
    r"labell?ed|lettered|marked|named|called)(?:\s+as|\s+with)?\s+)"
)
_FILLER = (
    r"(?:[\s,:(\"']|\b(?:to|be|the|a|one|that|which|is|are|appears?|seems?|looks?|point|points|circle|object|option|"
    r"choice|marked|labell?ed|as|by|far|clearly|definitely|probably|likely|actually|indeed|visually|physically|"
    r"positioned|located|situated|placed|considered|also|thus|therefore|much|slightly|relatively|significantly|most|"
    r"in|fact|have|been)\b)*"
)
_SOME = "<([A-H]+)>"

# `A p27 d21 B p03 d09: A`: cells and their nearness may be named before the conclusion (`perceptio_hf.world.cells`).
_STEPS = re.compile(r"\s*(?:(?:[A-H] )?p\d{2,} ?(?:d\d{2,} ?)?)+:")

# --- marking -----------------------------------------------------------------------------------------------------

# "A" is a letter only before these words, or before none: else it is the article.
_BEHIND_A = rf"{_VERBS}|and|or|nor|because|since|as|but|which|where|while|with|due|than|in|on|at|for|from|to|not|[A-H]"
_NO_ARTICLE = rf"(?!(?<=[Aa])\s+(?!(?:{_BEHIND_A})\b)[A-Za-z])"
_INTRODUCED = "|".join(f"(?<={word} )" for word in ("point", "option", "choice", "letter", "labeled"))
_INTRODUCED += "|(?<=answer )|(?<=answer is )|(?<=answer: )"
_LETTER = re.compile(
    r"(?<!\w)[\[(]\s*[\"']?([A-Ha-h])[\"']?\s*[\])]"  # (B) [b] ("B")
    r"|[\"']([A-Ha-h])[\"'](?!\w)"  # "B"
    r"|(?<![\w<'-])([A-H])\)"  # B)
    rf"|(?i:{_INTRODUCED})([a-h])(?![\w'-]){_NO_ARTICLE}"  # point b
    rf"|(?<![\w<'-])(?<!\w\.)([A-H])(?![\w-]|'[^s]|\.\w){_NO_ARTICLE}"  # B
)
_LEADING = re.compile(rf"^\W*{_NAME}?(?:[\[(]([A-H])[\])]\s*|([A-H])[).:]\s+)(?!\W|{_VERB}|and\b|or\b)", re.IGNORECASE)
_LINK = r"\s*,?\s*(?:(?:and/or|and|or|nor|to)\b|[/&+])(?:\s+(?:both|also|maybe|perhaps|possibly|even)\b)?\s*"
_TOGETHER = re.compile(rf"<[A-H]+>(?:(?:{_LINK}|\s+)<[A-H]+>|\s*,\s*<[A-H]+>(?!\s*{_VERB}))+")


def without_steps(text: str) -> str:
    """`A p27 d21 B p03 d09: A` -> `A`; any other text stays as it is."""
    return _STEPS.sub("", text, count=1).strip() if _STEPS.match(text) else text


def sentences(text: str) -> list[str]:
    """The sentences of an answer without steps, tags, Markdown and TeX; its thoughts and its questions are left out."""
    text = unicodedata.normalize("NFKC", without_steps(text)).replace("’", "'").replace("“", '"').replace("”", '"')
    text = re.sub(r"<think>.*?(?:</think>|$)", " ", text, flags=re.DOTALL)
    text = re.sub(r"<([A-Ha-h])>", r"(\1)", text)
    text = text.replace("[SEG]", " ")
    text = re.sub(r"</?[A-Za-z|][^<>]{0,40}>", " ", text)
    text = re.sub(r"\\boxed\s*\{(?:\\\w+\{)?\W*([A-H])\W*\}+", r"the answer is (\1)", text)
    text = re.sub(r"[*_`#$<>]+", "", text)
    text = re.sub(r":\s*\n+", ": ", text).strip()
    if re.fullmatch(r"\W*[a-h]\W*", text):
        text = text.upper()
    text = re.sub(r"(^|\n)\s*([A-H])\.(?=\w)", r"\1\2. ", text)  # "B.The lamp"
    parts = (part.strip() for part in re.split(r"(?<=[.!?;])\s+|\n+", text))
    return [part.rstrip(".!; ") for part in parts if part and not part.endswith("?")]


def mark_letters(sentence: str) -> str:
    """Write the letters that name choices as <B>, those named together as <AB>; a leading "(B) The lamp" as <B>: ..."""
    sentence = _LEADING.sub(lambda match: f"<{(match[1] or match[2]).upper()}>: ", sentence)
    sentence = _LETTER.sub(lambda match: f"<{match[match.lastindex].upper()}>", sentence)
    sentence = re.sub(rf"{_NAME}+(?=<)", "", sentence, flags=re.IGNORECASE)
    return _TOGETHER.sub(lambda match: f"<{''.join(sorted(set(re.findall('[A-H](?=[A-H]*>)', match[0]))))}>", sentence)


# --- statements --------------------------------------------------------------------------------------------------

_ASIDE = re.compile(
    rf"(?:\bnot|n't|\brather than|\binstead of|\bunlike|\bexcept)\s+(?:[a-z]+\s+){{0,2}}{_SOME}"
    r"|\b(?:among|amongst|of|between|out of|from)\s+(?:[a-z]+\s+){0,4}[:,]?\s*<[A-H]{2,}>"
    r"|\bif\b[^<>,]*,",
    re.IGNORECASE,
)
_CLAUSE = re.compile(
    r"[,;]?\s*\b(?:but|while|whereas|although|though|however|because|since|as (?:it|this|its|they)|making|meaning)\b,?"
    rf"|,\s*and\b|\s+and\s+(?=<[A-H]+>\s+\w)|,\s*(?=<[A-H]+>\s*{_VERB})"
    # "the farthest is A, the nearest is B": another subject
    rf"|,\s*(?=(?:the\s+)?(?:one\s+)?(?:closest|nearest|closer|nearer)\b[^<>,;]{{0,60}}?(?:{_VERB}|[:=–—-]|\s){_FILLER}<)",
    re.IGNORECASE,
)
_DOUBT = re.compile(
    r"n't\b|\b(?:not|never|cannot|if|whether|either|neither|none|unable|impossible|difficult|hard|unclear|uncertain|"
    r"unsure|equally|no (?:way|point|clear|single))\b",
    re.IGNORECASE,
)
_CONCLUDING = re.compile(r"\b(?:so|therefore|thus|hence|finally|overall|in conclusion|to conclude)\b", re.IGNORECASE)
_SAY = (
    r"(?:\bi(?:'d| would| will|'ll)?\s+(?:say|choose|pick|select|go with|guess|think|believe)|"
    r"\bmy (?:guess|choice|pick) (?:is|would be)|\b(?:it|that)(?:'s| is| must be| would be| should be)|\blooks like)"
)
_PLAIN_RULES = [
    (3, rf"\b(?:answer|option|choice|response|letter)\b[^<>]{{0,80}}?(?:\bis\b|\bbe\b|[:=→]){_FILLER}{_SOME}"),
    (3, rf"\banswer\s*[–—-]?\s*{_SOME}"),
    (3, rf"^\W*(?:ans|result|conclusion)\s*[:=]\s*{_SOME}"),
    (3, rf"^\W*(?:i\s+)?(?:choose|pick|select)\s+{_SOME}\W*$"),
    (3, rf"{_SOME}\s+{_VERB}\s+(?:(?:be|the|final|best|most|likely)\s+)*(?:correct|right|answer)\b"),
    (2, rf"^\W*(?:(?:so|therefore|thus|hence|sure|yes|okay|ok|well)\b\W*)*{_SOME}\W*$"),
    (2, rf"^{_SOME}\s*[:–—-]\s*(?!{_VERB})(?!.*<(?!\1>))"),
    (2, rf"^{_SOME}\s*,(?![^<>]*{_VERB})"),
    (2, rf"{_SAY}\s*(?:that\s+)?(?:it(?:'s| is| would be| must be)\s+)?{_FILLER}{_SOME}\s*(?:$|[.,;:])"),
]
_RULES = [(strength, re.compile(pattern, re.IGNORECASE)) for strength, pattern in _PLAIN_RULES]
_SUBJECT = rf"{_SOME}(?:[^<>]*?{_VERB})?{_FILLER}\b(?:WORD)\b"
_OBJECT = (
    r"(?<!second[ -])(?<!third[ -])(?<!next[ -])\b(?:WORD)\b"
    rf"(?:[^<>]*?(?:\b(?:is|be|as|namely)\b|[:=→,–—-]){_FILLER}|\s+){_SOME}"
)
_NEAREST, _NEARER = (
    [re.compile(pattern.replace("WORD", words), re.IGNORECASE) for pattern in (_SUBJECT, _OBJECT)]
    for words in ("closest|nearest", "closer|nearer")
)
_OTHER = re.compile(
    r"\b(?:than|compared (?:to|with)|relative to)\b[^<>]*<[A-H]+>|\b(?:to|from|of|near|followed by|then)\s+<[A-H]+>",
    re.IGNORECASE,
)
_THAN = re.compile(rf"\bthan\b(?:\s*{_SOME})?(\s+(?:any|all|every|both|(?:the\s+)?(?:others?|rest))\b)?", re.IGNORECASE)


def statements(sentence: str, num_choices: int) -> list[Statement]:
    """What a sentence says about which choice is right."""
    concluding = bool(_CONCLUDING.search(sentence))
    found = []
    for clause in _CLAUSE.split(_ASIDE.sub("", mark_letters(sentence))):
        if clause and not _DOUBT.search(clause):
            found += [Statement(*said, concluding) for said in _clause_statements(clause.strip(), num_choices)]
    return found


def _clause_statements(clause: str, num_choices: int) -> list[tuple[int, str]]:
    said = [(strength, letters) for strength, rule in _RULES for letters in rule.findall(clause)]
    compared, clause = _beats_all(clause, num_choices), _OTHER.sub("", clause)
    said += [(2, letters) for letters in _about(_NEAREST, clause)]
    if compared:
        said += [(1, letters) for letters in _about(_NEARER, clause)]
    return said


def _about(rules: list[re.Pattern], clause: str) -> list[str]:
    """The letters of which the first rule that applies speaks."""
    for rule in rules:
        if found := rule.findall(clause):
            return found
    return []


def _beats_all(clause: str, num_choices: int) -> bool:
    """Whether "closer" compares with every other choice: none is named, all are, or there is only one other."""
    than = _THAN.search(clause)
    return than is None or num_choices == 2 or bool(than[2]) or len(than[1] or "") == num_choices - 1
