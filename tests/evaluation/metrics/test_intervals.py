"""Intervals against published values, defining equations and their coverage."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceptio_hf.evaluation.metrics.intervals import paired_interval, wilson_interval


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


def test_a_difference_of_pairs_has_a_width_where_nothing_or_everything_changed():
    for gained, lost, trials in ((0, 0, 2), (0, 0, 1000), (0, 3, 3), (5, 0, 5)):
        low, high = paired_interval(gained, lost, trials)
        assert -1 <= low < (gained - lost) / trials <= high <= 1 or -1 <= low <= (gained - lost) / trials < high <= 1
    assert paired_interval(0, 0, 1000)[1] == pytest.approx(0.0028, abs=1e-4)


@pytest.mark.parametrize(("gains", "losses", "trials"), [(0.1, 0.3, 40), (0.02, 0.02, 100), (0.0, 0.5, 20)])
def test_about_95_percent_of_paired_intervals_hold_the_truth(gains, losses, trials):
    drawn = np.random.default_rng(0).multinomial(trials, [gains, losses, 1 - gains - losses], 4000)
    bounds = [paired_interval(int(gained), int(lost), trials) for gained, lost, _ in drawn]
    assert 0.93 < np.mean([low <= gains - losses <= high for low, high in bounds]) <= 1


def test_counts_that_cannot_be():
    for numbers in ((0, 0, 0), (-1, 0, 3), (2, 2, 3), (1, 1, 3, 1.0)):
        with pytest.raises(ValueError, match="together at most the trials"):
            paired_interval(*numbers)
