"""Accuracy on multiple-choice questions, plain and circular, as MMBench counts it.

CircularEval (Liu et al. 2023, "MMBench: Is Your Multi-modal Model an All-around Player?") asks a question with N
choices N times, the choices rotated by one each time, and counts it as right only if every answer is right. In
MMBench's tables the rotated rows of a question share its index modulo one million.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from .answer_parsing import MAX_CHOICES, answer_choice, answer_letter, reference_letter

INDEX_PERIOD = 1_000_000


@dataclass(frozen=True)
class _Row:
    right: bool
    read: bool
    question: int | None  # index modulo the period
    choices: int | None  # how many, where they are known
    category: str
    l2_category: str


def multiple_choice_accuracy(
    predictions: Sequence[str],
    references: Sequence[str | int],
    *,
    choices: Sequence[Sequence[str] | None] | None = None,
    index: Sequence[int | None] | None = None,
    category: Sequence[str | None] | None = None,
    l2_category: Sequence[str | None] | None = None,
) -> dict:
    """Score answers to multiple-choice questions.

    Args:
        predictions: What the model wrote; read by `answer_choice`, or by `answer_letter` where `choices` are missing.
        references: The right choice: "B", "(B)" or its index from 0.
        choices: The texts of the choices A, B, ... of each row; None or an empty list where they are not known.
        index: MMBench's index of each row; rows with the same index modulo one million are one question. None where
            there is none.
        category, l2_category: The ability a row tests, and its coarser class; None or "" for none.

    Returns:
        "accuracy": share of right rows. "circular_accuracy": share of questions with all rows right; None where no
        question has more than one row, so nothing was rotated. "samples": rows; "questions": those that
        `circular_accuracy` counts; "incomplete_questions": those left out of it because they have fewer rows than
        choices (known only with `choices`). "unparsable": rows whose answer cannot be read; they count as wrong.
        "by_category", "by_l2_category": the same figures for each name that occurs, in alphabetical order.

    Raises:
        ValueError: no rows, lists of different lengths, an index that occurs twice, some rows with and some without
            index, rows of one question in two categories, or a reference beyond the choices; the row is named, counted
            from 0.
    """
    columns = _columns(len(predictions), references=references, choices=choices, index=index, category=category)
    columns |= _columns(len(predictions), l2_category=l2_category)
    _check_index(columns["index"])
    rows = []
    for row, values in enumerate(zip(predictions, *columns.values(), strict=True)):
        try:
            rows.append(_read_row(*values))
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from None
    _check_categories(rows)
    return {
        **_figures(rows),
        "by_category": _grouped(rows, "category"),
        "by_l2_category": _grouped(rows, "l2_category"),
    }


def _columns(length: int, **columns: Sequence | None) -> dict[str, list]:
    if not length:
        raise ValueError("there are no answers to score.")
    for name, values in columns.items():
        if values is not None and len(values) != length:
            raise ValueError(f"{length} predictions, but {len(values)} values of {name}.")
    return {name: [None] * length if values is None else list(values) for name, values in columns.items()}


def _check_index(index: list[int | None]) -> None:
    if all(value is None for value in index):
        return
    first: dict[int, int] = {}
    for row, value in enumerate(index):
        if value is None or value < 0:
            raise ValueError(f"row {row} has no index, others have one; give all or none.")
        if value in first:
            raise ValueError(f"rows {first[value]} and {row} both have index {value}; every row needs its own.")
        first[value] = row


def _read_row(
    text: str,
    reference: str | int,
    choices: Sequence[str] | None,
    index: int | None,
    category: str | None,
    l2_category: str | None,
) -> _Row:
    count = len(choices) if choices else None
    right = reference_letter(reference, count or MAX_CHOICES)
    letter = answer_choice(text, choices) if choices else answer_letter(text)
    question = None if index is None else index % INDEX_PERIOD
    count = sum(1 for choice in choices if choice) if choices else None  # those that can be rotated
    return _Row(letter == right, letter is not None, question, count, category or "", l2_category or "")


def _check_categories(rows: list[_Row]) -> None:
    names: dict[int, tuple[str, str]] = {}
    for number, row in enumerate(rows):
        if row.question is None:
            return
        own = (row.category, row.l2_category)
        if names.setdefault(row.question, own) != own:
            raise ValueError(f"row {number}: question {row.question} is in {names[row.question]} and in {own}.")


def _grouped(rows: list[_Row], name: str) -> dict[str, dict]:
    groups = defaultdict(list)
    for row in rows:
        if getattr(row, name):
            groups[getattr(row, name)].append(row)
    return {key: _figures(groups[key]) for key in sorted(groups)}


def _figures(rows: list[_Row]) -> dict[str, float | int | None]:
    questions = defaultdict(list)
    for row in rows:
        if row.question is not None:
            questions[row.question].append(row)
    rotated = any(len(group) > 1 for group in questions.values())
    complete = [group for group in questions.values() if len(group) >= (group[0].choices or 1)] if rotated else []
    circular = [all(row.right for row in group) for group in complete]
    return {
        "accuracy": sum(row.right for row in rows) / len(rows),
        "circular_accuracy": sum(circular) / len(circular) if circular else None,
        "samples": len(rows),
        "questions": len(circular),
        "incomplete_questions": len(questions) - len(circular) if rotated else 0,
        "unparsable": sum(not row.read for row in rows),
    }
