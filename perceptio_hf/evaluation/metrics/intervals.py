"""How sure a measured share is."""

from math import sqrt
from statistics import NormalDist


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson 1927); it stays within [0, 1] also at 0 and at `trials`.

    Args:
        successes: 0 to `trials`.
        trials: At least 1.
        confidence: Between 0 and 1, the share of such intervals that hold the true value.

    Returns:
        (low, high).

    Raises:
        ValueError: for numbers outside these ranges.
    """
    if trials < 1 or not 0 <= successes <= trials or not 0.0 < confidence < 1.0:
        raise ValueError(
            f"an interval needs 0 <= successes <= trials, at least one trial and a confidence in (0, 1); "
            f"came {successes} of {trials} at {confidence}."
        )
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # Rounding may leave the bounds a hair outside the share they must hold.
    return max(0.0, min(share, (centre - spread) / scale)), min(1.0, max(share, (centre + spread) / scale))


def paired_interval(gained: int, lost: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the difference of two shares that were measured on the same trials, gained - lost over trials: Wald's
    with one gain and one loss more (D. G. Bonett, R. M. Price 2012). It has a width also where nothing or everything
    changed.

    Args:
        gained, lost: trials that only the second, and only the first way got right; together at most `trials`.

    Returns:
        (low, high), within [-1, 1].

    Raises:
        ValueError: for numbers outside these ranges.
    """
    if trials < 1 or gained < 0 or lost < 0 or gained + lost > trials or not 0.0 < confidence < 1.0:
        raise ValueError(
            f"an interval needs counts of 0 or more that are together at most the trials, at least one trial and a "
            f"confidence in (0, 1); came {gained} gained and {lost} lost of {trials} at {confidence}."
        )
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    more, less = (gained + 1) / (trials + 2), (lost + 1) / (trials + 2)
    spread = z * sqrt((more + less - (more - less) ** 2) / (trials + 2))
    return max(-1.0, more - less - spread), min(1.0, more - less + spread)
