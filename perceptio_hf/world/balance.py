"""Keeping questions free of shortcuts.

In a natural scene near things stand low in the picture and cover many pixels, so a reader could answer "which is
nearer" from that alone. A *choice model* says how well: it gives every option i of a question, described by features
f_i that need no depth, the probability q_i = softmax(w . f)_i of being the right one, with weights w fitted to
unfiltered questions (conditional logistic regression). Drawing questions in proportion to 1 / q_right leaves every
option equally likely to be right given the features, as far as the model is true.
"""

import math
import random
from collections.abc import Sequence

from .parts import weighted


def surprise(features: Sequence[Sequence[float]], weights: Sequence[float], right: int) -> float:
    """1 / q_right for a question with these options (one row of features each) whose answer is option `right`."""
    scores = [sum(f * w for f, w in zip(row, weights, strict=True)) for row in features]
    return sum(math.exp(score - scores[right]) for score in scores)


def draw_fair(r: random.Random, surprises: Sequence[float], limit: float, enough: float) -> int | None:
    """The index of the question to ask out of one scene's proposals, or None to ask none of them.

    A question of surprise 1 / q is drawn in proportion to it, up to `limit`. Where the mean surprise of the proposals
    is below `enough` (the answers are obvious), nothing is asked in proportion more often.
    """
    odds = [min(s, limit) for s in surprises]
    if not odds or r.random() * enough * len(odds) > sum(odds):
        return None
    return weighted(r, odds)
