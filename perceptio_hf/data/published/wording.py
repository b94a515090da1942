"""How masks are asked for and answered in training, drawn by the picture so that every run asks alike."""

import random
from collections.abc import Sequence
from typing import Any

from perceptio_hf.tokens import SEG_TOKEN

# Benchmarks ask the first one; the others keep a model from knowing nothing but it.
_ASK_FOR_EXPRESSION = (
    "Please segment {} in this image.",
    "Segment {}.",
    "Where is {}? Please answer with a mask.",
    "Can you show me {}?",
)
_ASK_FOR_NAME = (
    "Please segment every {} in this image.",
    "Give me a mask for each {}.",
    "Segment all that is {}.",
)
_NOTHING = ("There is no such thing in the picture.", "Nothing in the picture is meant by that.")


def rng_of(*names: Any) -> random.Random:
    """Random numbers that depend on these names and on nothing else."""
    return random.Random(" ".join(map(str, names)))


def conversation(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Questions and answers in turn, as messages."""
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def expression_turn(rng: random.Random, expression: str, masks: int) -> tuple[str, str]:
    """Question and answer about what an expression refers to: one thing, several, or nothing."""
    question = rng.choice(_ASK_FOR_EXPRESSION).format(expression)
    if not masks:
        return question, rng.choice(_NOTHING)
    return question, SEG_TOKEN * masks + (" Here it is." if masks == 1 else " Here they are.")


def name_turn(rng: random.Random, name: str, masks: int) -> tuple[str, str]:
    """Question and answer about all things of a name; none where there are none."""
    question = rng.choice(_ASK_FOR_NAME).format(name)
    if not masks:
        return question, f"There is no {name} in the picture."
    return question, f"{SEG_TOKEN * masks} {masks} of {name}." if masks > 1 else f"{SEG_TOKEN} One {name}."


def names_turn(names: Sequence[str]) -> tuple[str, str]:
    """One question about several names, answered by a mask behind each."""
    listed = ", ".join(names[:-1]) + (" and " if names[1:] else "") + names[-1]
    return f"Please segment {listed} in this image.", ", ".join(f"{name} {SEG_TOKEN}" for name in names) + "."
