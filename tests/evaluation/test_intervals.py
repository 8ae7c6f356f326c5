"""Bootstrap intervals against closed forms and how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest

from paris_ray.evaluation import intervals
from paris_ray.evaluation.figures import Figure, Protocol
from paris_ray.evaluation.intervals import Interval


def test_of_one_seed_it_is_the_standard_error_of_a_mean():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    found = intervals.bootstrap(values, seed=1)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert found == intervals.bootstrap(values, seed=1) != intervals.bootstrap(values, seed=2)
    flat = intervals.bootstrap(np.full(7, 0.25), seed=0)
    assert (flat.value, flat.low, flat.high) == pytest.approx((0.25, 0.25, 0.25))


def test_seeds_count_as_much_as_they_vary():
    g = np.random.default_rng(0)
    captions, seeds = g.normal(size=(300, 1)), g.normal(size=(1, 8)) * 5
    found = intervals.bootstrap(captions + seeds, seed=0)
    # Both are drawn anew: the variances of the two means add up.
    half = 1.96 * np.sqrt(captions.var() / 300 + seeds.var() / 8)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)
    alone = intervals.bootstrap(np.broadcast_to(captions, (300, 8)), seed=0)
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * captions.std() / 300**0.5, rel=0.1)


def test_it_holds_the_truth_as_often_as_it_says():
    held = 0
    for trial in range(100):
        g = np.random.default_rng(trial)
        found = intervals.bootstrap((g.random(80) < 0.3).astype(float), seed=trial, repeats=300)
        held += found.low <= 0.3 <= found.high
    assert abs(held / 100 - 0.95) < 4 * (0.95 * 0.05 / 100) ** 0.5


def test_paired_sees_a_difference_that_lies_within_both_intervals():
    g = np.random.default_rng(0)
    hard = g.normal(size=(200, 3)) * 3  # how hard a caption is counts far more than the model
    a, b = hard + 0.2 + 0.1 * g.normal(size=(200, 3)), hard + 0.1 * g.normal(size=(200, 3))
    apart = [intervals.bootstrap(one, seed=0) for one in (a, b)]
    assert apart[0].low < apart[1].value < apart[0].high
    found = intervals.bootstrap_paired(a, b, seed=0)
    assert 0.15 < found.low < 0.2 < found.high < 0.25
    assert intervals.bootstrap_paired(b, a, seed=0).value == pytest.approx(-found.value)
    with pytest.raises(ValueError, match="same captions and seeds"):
        intervals.bootstrap_paired(a, b[:, :2], seed=0)


def test_sets_are_drawn_together_and_groups_whole():
    g = np.random.default_rng(0)
    a = g.normal(size=(400, 2))
    found = intervals.bootstrap_sets(lambda x: float(x[:, 0].mean()), a, seed=0, repeats=1000)
    assert found.value == pytest.approx(a[:, 0].mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * a[:, 0].std() / 20, rel=0.1)
    # A difference of two models on the same rows does not vary with the rows.
    paired = intervals.bootstrap_sets(lambda x, y: float(x.mean() - y.mean()), a, a + 1, seed=0)
    assert (paired.low, paired.high) == pytest.approx((-1, -1))
    # Four pictures of each of 100 captions that are alike: the interval is of 100, not of 400.
    alike, groups = np.repeat(a[:100], 4, 0), np.repeat(np.arange(100), 4)
    wide = intervals.bootstrap_sets(lambda x: float(x[:, 0].mean()), alike, seed=0, groups=groups, repeats=1000)
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * a[:100, 0].std() / 10, rel=0.1)
    with pytest.raises(ValueError, match="same caption"):
        intervals.bootstrap_sets(lambda x, y: 0.0, a, a[:3], seed=0)


def test_what_is_empty_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        intervals.bootstrap(np.zeros(0), seed=0)
    with pytest.raises(ValueError, match="needs at least 4"):
        intervals.split_floor(lambda a, b: 0.0, np.zeros((3, 2)), seed=0)


def test_a_figure_says_how_it_was_measured():
    protocol = Protocol(
        "512 pictures of demo", "512 held-out captions", "one a caption, hash(seed, id)", "1,000 held-out rows", "DINOv2 ViT-S/14",
        "to 224 pixels, bicubic", {"model": "abc", "encoder": "def"},
    )  # fmt: skip
    figure = Figure("Fréchet distance (DINOv2)", 12.34567, protocol, Interval(12.34567, 11, 13.5), Interval(0.5, 0.4, 0.6), None)
    said = str(figure)
    assert said.startswith("Fréchet distance (DINOv2): 12.35 (95 %: 11 … 13.5), floor 0.5 (0.4 … 0.6)")
    for piece in ("made 512 pictures of demo", "model abc", "encoder def", "resize to 224 pixels", "reference 1,000 held-out rows", "seeds one a"):
        assert piece in said
    assert figure.as_json()["protocol"]["fingerprints"] == {"model": "abc", "encoder": "def"}
    plain = Figure("alignment", 0.5, Protocol("8 pictures", "8 captions", "one"), chance=0.01)
    assert str(plain) == "alignment: 0.5, chance 0.01 [made 8 pictures; prompts 8 captions; seeds one]"
    assert plain.as_json() == {
        "name": "alignment", "value": 0.5, "chance": 0.01, "protocol": {"made": "8 pictures", "prompts": "8 captions", "seeds": "one"},
    }  # fmt: skip
