"""Questions out of the wording of each benchmark."""

from collections.abc import Sequence

from .registration import BENCHMARKS


def ask(benchmark: str, **fields: str) -> str:
    """The question of one sample: the benchmark's template with its fields filled in."""
    return BENCHMARKS[benchmark].prompt.template.format(**fields)


def listed_options(letters: Sequence[str], texts: Sequence[str]) -> str:
    """Choices as lines `A. text`."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True))


def named_letters(letters: Sequence[str]) -> str:
    """`A, B or C`."""
    return f"{', '.join(letters[:-1])} or {letters[-1]}"
