"""Wilson's interval against published values, its defining equation and its coverage."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceptio_hf.evaluation.metrics.intervals import wilson_interval


def test_published_values():
    # R: prop.test(x, n, correct = FALSE)$conf.int
    assert wilson_interval(15, 50) == pytest.approx((0.1910, 0.4375), abs=5e-5)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=5e-5)


@settings(deadline=None)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_bounds_solve_the_score_equation(numbers, confidence):
    right, trials = numbers
    low, high = wilson_interval(right, trials, confidence)
    share = right / trials
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1 and bound != share:
            z = abs(share - bound) / math.sqrt(bound * (1 - bound) / trials)
            assert math.erf(z / math.sqrt(2)) == pytest.approx(confidence, abs=1e-6)


def test_about_95_percent_hold_the_truth():
    drawn = np.random.default_rng(0).binomial(124, 0.62, 2000)
    held = [low <= 0.62 <= high for low, high in (wilson_interval(int(right), 124) for right in drawn)]
    assert 0.93 < np.mean(held) < 0.97


def test_bad_numbers():
    for numbers in ((0, 0), (-1, 3), (4, 3), (1, 3, 0.0), (1, 3, 1.0)):
        with pytest.raises(ValueError, match="0 <= successes <= trials"):
            wilson_interval(*numbers)
