"""Intervals of means: against what is known of them, and of pictures that are hard for all."""

import numpy as np
import pytest

from ast_plugin.compare.bootstrap import estimate, paired_difference


def test_equal_values_leave_no_doubt():
    found = estimate([3.5] * 7)
    assert (found.mean, found.low, found.high) == (3.5, 3.5, 3.5)


def test_two_values():
    """Both drawn, or the lower one twice, or the higher one twice: a quarter of the samples each at the ends."""
    found = estimate([0.0, 1.0], confidence=0.95)
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)
    narrow = estimate([0.0, 1.0], confidence=0.4)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_interval_is_the_normal_ones_where_that_holds():
    values = np.random.default_rng(1).normal(30, 2, 400)
    found = estimate(values, resamples=4000)
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)


def test_it_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(2)
    hits = 0
    for _ in range(300):
        found = estimate(generator.normal(0, 1, 60), confidence=0.8, resamples=400)
        hits += found.low <= 0 <= found.high
    assert 0.72 < hits / 300 < 0.86


def test_the_same_values_give_the_same_interval():
    values = [20.0, 25.0, 31.0]
    assert estimate(values) == estimate(values)


@pytest.mark.parametrize('values', [[5.0], [float('inf'), 30.0]])
def test_no_interval_without_two_finite_values(values):
    found = estimate(values)
    assert found.low is found.high is None
    assert found.mean == np.mean(values)


def test_a_gain_on_every_picture_is_sure_however_the_pictures_differ():
    baseline = [10.0, 20.0, 30.0, 40.0]
    found = paired_difference([value + 0.5 for value in baseline], baseline)
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)
    assert estimate(baseline).high - estimate(baseline).low > 10


def test_many_pictures_are_drawn_in_parts():
    found = estimate(np.arange(50_000, dtype=float), resamples=200)
    assert found.low < 24_999.5 < found.high
    assert found.high - found.low < 600
