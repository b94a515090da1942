"""Keeping questions free of shortcuts.

In a natural scene near things stand low in the picture and cover many pixels, so a reader could answer "which is
nearer" from that alone. A *choice model* says how well: it gives every option i of a question, described by features
f_i that need no depth, the probability q_i = softmax(w . f)_i of being the right one, with weights w fitted to
unfiltered questions (conditional logistic regression). Keeping a question with a probability in proportion to
1 / q_right leaves every option equally likely to be right given the features, as far as the model is true.
"""

import math
import random
from collections.abc import Sequence


def is_fair(r: random.Random, features: Sequence[Sequence[float]], weights: Sequence[float], right: int, low: float) -> bool:
    """Whether to keep a question with these options (one row of features each) whose answer is option `right`.

    `low` is the smallest q_right that is made up for; the smaller, the fewer questions are kept.
    """
    scores = [sum(f * w for f, w in zip(row, weights, strict=True)) for row in features]
    share = 1 / sum(math.exp(score - scores[right]) for score in scores)
    return r.random() * share < low
