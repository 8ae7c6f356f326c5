"""Intervals against closed forms, and how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from paris_ray.evaluation import intervals


def test_of_one_seed_it_is_students_interval():
    values = np.random.default_rng(0).normal(3, 2, size=40)
    found = intervals.mean_interval(values)
    assert (found.low, found.high) == pytest.approx(stats.ttest_1samp(values, 0).confidence_interval(0.95))
    assert (found.value, found.seeds) == (pytest.approx(values.mean()), 1)
    flat = intervals.mean_interval(np.full(7, 0.25))
    assert (flat.value, flat.low, flat.high) == pytest.approx((0.25, 0.25, 0.25))


def test_where_seeds_alone_vary_it_is_students_of_the_seeds():
    seeds = np.array([0.1, 0.3, -0.05])
    found = intervals.mean_interval(np.broadcast_to(seeds, (300, 3)))
    assert (found.low, found.high) == pytest.approx(stats.ttest_1samp(seeds, 0).confidence_interval(0.95))
    assert (found.seeds, found.agree) == (3, 2)
    # Three of one sign are no proof: by chance alone they are it once in four.
    assert intervals.mean_interval(np.broadcast_to([0.1, 0.3, 0.05], (300, 3))).low < 0


@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("both", [0.0, 2.0])
def test_of_no_difference_one_in_twenty_is_called_one_at_most(spread, both):
    """Captions, three trainings that vary by a multiple of the captions' standard error, and what varies with both."""
    g, wrong, trials = np.random.default_rng(0), 0, 2000
    for _ in range(trials):
        captions, trainings = g.normal(size=(200, 1)), g.normal(size=(1, 3)) * spread * (3 / 200) ** 0.5
        found = intervals.mean_interval(captions + trainings + both * g.normal(size=(200, 3)))
        wrong += not found.low <= 0 <= found.high
    assert wrong / trials <= 0.06


def test_paired_sees_a_difference_that_lies_within_both_intervals():
    g = np.random.default_rng(0)
    hard = g.normal(size=(200, 3)) * 3  # how hard a caption is counts far more than the model
    a, b = hard + 0.2 + 0.1 * g.normal(size=(200, 3)), hard + 0.1 * g.normal(size=(200, 3))
    apart = [intervals.mean_interval(one) for one in (a, b)]
    assert apart[0].low < apart[1].value < apart[0].high
    found = intervals.paired_interval(a, b)
    assert 0.1 < found.low < 0.2 < found.high < 0.3
    assert intervals.paired_interval(b, a).value == pytest.approx(-found.value)
    with pytest.raises(ValueError, match="same captions and seeds"):
        intervals.paired_interval(a, b[:, :2])


def test_captions_that_ask_the_same_thing_count_as_one():
    a = np.random.default_rng(0).normal(size=50)
    alike, groups = np.repeat(a, 4), np.repeat(np.arange(50), 4)
    found, once = intervals.mean_interval(alike, groups), intervals.mean_interval(a)
    assert (found.low, found.high) == pytest.approx((once.low, once.high))


def test_a_statistic_of_sets_has_the_interval_of_a_mean_where_it_is_one():
    g = np.random.default_rng(0)
    a = g.normal(size=(400, 3, 2)) + np.array([0.0, 1.0, 0.5])[None, :, None]
    found = intervals.sets_interval(lambda x: float(x[:, 0].mean()), a, seed=0, repeats=400)
    mean = intervals.mean_interval(a[..., 0])
    assert found.value == pytest.approx(mean.value)
    assert found.high - found.low == pytest.approx(mean.high - mean.low, rel=0.05)
    # A difference of two models on the same rows does not vary with the rows.
    paired = intervals.sets_interval(lambda x, y: float(x.mean() - y.mean()), a, a + 1, seed=0)
    assert (paired.low, paired.high) == pytest.approx((-1, -1))
    with pytest.raises(ValueError, match="they must have the same"):
        intervals.sets_interval(lambda x, y: 0.0, a, a[:, :2], seed=0)


def test_what_is_empty_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        intervals.mean_interval(np.zeros(0))
    with pytest.raises(ValueError, match="needs at least 4"):
        intervals.split_floor(lambda a, b: 0.0, np.zeros((3, 2)), seed=0)
