"""How often the nearest of several marked points is named: HardBLINK's questions, and BLINK's on relative depth."""

from collections import defaultdict
from collections.abc import Sequence

from .answer_parsing import answer_letter, reference_letter
from .intervals import wilson_interval

MOST_POINTS = 5  # of HardBLINK's sets; letters up to E are read where the number of points is not said


def relative_depth_accuracy(
    predictions: Sequence[str],
    references: Sequence[str | int],
    num_points: Sequence[int | None] | None = None,
    *,
    confidence: float = 0.95,
) -> dict[str, float | int | tuple[float, float]]:
    """Score answers to "which point is the closest to the camera?".

    Args:
        predictions: What the model wrote, read by `answer_letter`.
        references: The right point: "B", "(B)" or its index from 0.
        num_points: How many points each picture has; None where it is not known.
        confidence: Of the intervals.

    Returns:
        "accuracy": share of right answers; "accuracy_interval": Wilson's (low, high); "samples": how many;
        "unparsable": how many answers name no point or one that is not there. They count as wrong.
        For every number of points N that occurs, "accuracy_N", "accuracy_N_interval", "samples_N", "unparsable_N".

    Raises:
        ValueError: no samples, lists of different lengths, a number of points outside 2 to 8, or a reference beyond
            the points; the sample is named, counted from 0.
    """
    counts = [None] * len(predictions) if num_points is None else list(num_points)
    if not len(predictions) == len(references) == len(counts):
        raise ValueError(
            f"{len(predictions)} predictions, {len(references)} references and {len(counts)} numbers of points do not "
            f"belong together."
        )
    if not counts:
        raise ValueError("there are no answers to score.")
    groups: dict[int | None, list[bool | None]] = defaultdict(list)
    for sample, (text, reference, points) in enumerate(zip(predictions, references, counts, strict=True)):
        try:
            groups[points].append(_is_right(text, reference, MOST_POINTS if points is None else int(points)))
        except ValueError as error:
            raise ValueError(f"sample {sample}: {error}") from None
    scores = _scores([answer for group in groups.values() for answer in group], "", confidence)
    for points in sorted(points for points in groups if points is not None):
        scores |= _scores(groups[points], f"_{points}", confidence)
    return scores


def _is_right(text: str, reference: str | int, points: int) -> bool | None:
    """None for an answer that cannot be read."""
    letter, right = answer_letter(text, points), reference_letter(reference, points)
    return None if letter is None else letter == right


def _scores(answers: Sequence[bool | None], suffix: str, confidence: float) -> dict:
    right = sum(answer is True for answer in answers)
    return {
        f"accuracy{suffix}": right / len(answers),
        f"accuracy{suffix}_interval": wilson_interval(right, len(answers), confidence),
        f"samples{suffix}": len(answers),
        f"unparsable{suffix}": sum(answer is None for answer in answers),
    }
