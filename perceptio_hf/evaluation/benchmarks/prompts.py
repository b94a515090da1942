"""The wording of every benchmark's questions, in one table, each with where it comes from.

Scores depend on the wording, so it is part of a result: every summary records the template it was asked with.
"""

from collections.abc import Sequence
from typing import NamedTuple

from perceptio_hf.world.questions import DEPTH_QUESTIONS

_SEGMENT = "Please segment {expression} in this image."
_CHOOSE = "{hint}{question}\n{options}\nAnswer with the option's letter from the given choices directly."
_SA2VA = "Sa2VA's evaluation of referring segmentation"
_INTERNVL = "InternVL's prompt for multiple choice in VLMEvalKit; the hint, if any, stands on a line of its own"


class Prompt(NamedTuple):
    """template: {expression}, {question}, {hint} and {options} are replaced by what the data say; source: of the
    wording."""

    template: str
    source: str


PROMPTS = {
    "refcoco": Prompt(_SEGMENT, _SA2VA),
    "refcoco+": Prompt(_SEGMENT, _SA2VA),
    "refcocog": Prompt(_SEGMENT, _SA2VA),
    "grefcoco": Prompt(_SEGMENT, f"{_SA2VA}, which has no other wording for expressions without a target"),
    "hardblink": Prompt("{question}", "the published question, as AURORA asks it"),
    "blink-depth": Prompt("{question}", "BLINK's field `prompt`: question and choices"),
    "mmbench": Prompt(_CHOOSE, _INTERNVL),
    "scienceqa": Prompt(_CHOOSE, _INTERNVL),
    "ai2d": Prompt(_CHOOSE, _INTERNVL),
    "depth": Prompt(DEPTH_QUESTIONS[0], "ours: the rendered world's first question of this kind"),
    "world-refer": Prompt("{question}", "the rendered world's own questions"),
    "world-closest": Prompt("Which is closest to the camera: {options}?", "ours: names the letters that are drawn"),
    "world-plain": Prompt("{question}", "the rendered world's own questions"),
    "world-depth": Prompt(DEPTH_QUESTIONS[0], "ours: the rendered world's first question of this kind"),
}


def ask(benchmark: str, **fields: str) -> str:
    """The question of one sample: the benchmark's template with its fields filled in."""
    return PROMPTS[benchmark].template.format(**fields)


def listed_options(letters: Sequence[str], texts: Sequence[str]) -> str:
    """Choices as lines `A. text`."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True))


def named_letters(letters: Sequence[str]) -> str:
    """`A, B or C`."""
    return f"{', '.join(letters[:-1])} or {letters[-1]}"
