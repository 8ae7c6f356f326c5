"""Metrics against brute force and closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from paris_ray.evaluation import metrics


def _cosine(a, b):
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a) * sum(float(y) ** 2 for y in b))


def test_nearest_equals_a_loop_in_python_floats(monkeypatch):
    rng = np.random.default_rng(0)
    originals = rng.normal(size=(37, 5)).astype(np.float16)
    queries = rng.normal(size=(11, 5)).astype(np.float32)
    expected = [max(range(37), key=lambda j: _cosine(q, originals[j])) for q in queries]
    for block in (65_536, 7, 1):
        monkeypatch.setattr(metrics, "_BLOCK", block)
        index, distance = metrics.nearest(queries, originals)
        assert index.tolist() == expected
        np.testing.assert_allclose(distance, [1 - _cosine(q, originals[j]) for q, j in zip(queries, expected, strict=True)], atol=1e-6)


def test_nearest_ignores_length_takes_the_first_of_equals_and_survives_zero_rows():
    originals = np.array([[0, 0], [3, 0], [1, 0], [0, 5]], np.float16)
    index, distance = metrics.nearest(np.array([[0.1, 0], [0, 100], [0, 0]], np.float32), originals)
    assert index.tolist() == [1, 3, 0]
    np.testing.assert_allclose(distance, [0, 0, 1], atol=1e-7)


def test_nearest_refuses_other_widths_and_an_empty_corpus():
    with pytest.raises(ValueError, match="same embedder"):
        metrics.nearest(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(ValueError, match="corpus is empty"):
        metrics.nearest(np.ones((2, 3)), np.ones((0, 3)))


def test_copy_bound_equals_a_loop(monkeypatch):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(60, 6)).astype(np.float16)
    groups = [f"g{i % 20}" for i in range(60)]
    nearest_other = [min(1 - _cosine(rows[i], rows[j]) for j in range(60) if groups[j] != groups[i]) for i in range(60)]
    for block in (65_536, 13):
        monkeypatch.setattr(metrics, "_BLOCK", block)
        assert metrics.copy_bound(rows, groups) == pytest.approx(np.percentile(nearest_other, 1.0), abs=1e-6)
    assert metrics.copy_bound(rows[:3], ["a", "a", "a"]) == 0.0


def test_wilson_against_published_values_and_the_equation_it_solves():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    for hits, of, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]:
        found = metrics.wilson(hits, of)
        assert found == pytest.approx((low, high), abs=5e-5)
    z = 1.959963984540054
    for end in metrics.wilson(13, 64):  # both ends solve |p̂ − p| = z √(p(1−p)/n)
        assert abs(13 / 64 - end) == pytest.approx(z * math.sqrt(end * (1 - end) / 64), rel=1e-9)
    assert metrics.wilson(64, 64)[1] == 1.0
    assert metrics.wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="between 0 and"):
        metrics.wilson(3, 2)


def test_chance_is_the_mean_over_all_permutations():
    asked, found = ["a", "a", "b", "c", "d"], ["a", "b", "b", "b", "e"]
    shares = [sum(x == y for x, y in zip(asked, order, strict=True)) / 5 for order in itertools.permutations(found)]
    assert metrics.chance(asked, found) == pytest.approx(sum(shares) / len(shares))
    assert metrics.chance(["a"] * 4, ["a"] * 4) == 1.0
    assert math.isnan(metrics.chance([], []))
    with pytest.raises(ValueError, match="same pictures"):
        metrics.chance(["a"], [])


def test_share_counts_what_is_known():
    counted = metrics.share([True, None, False, True])
    assert (counted.hits, counted.of) == (2, 3)
    assert counted.as_json()["share"] == pytest.approx(2 / 3)
    assert metrics.share([None]).as_json() == {"hits": 0, "of": 0, "share": None, "low": 0.0, "high": 1.0}


def test_pixel_difference_does_not_wrap_around():
    black, white = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)
    assert metrics.pixel_difference(black, white).tolist() == [1.0]
    assert metrics.pixel_difference(white, black).tolist() == [1.0]
    assert metrics.pixel_difference(black, black + 2)[0] == pytest.approx(metrics.PIXEL_COPY)


def test_border_colour_reads_the_ring_only():
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[0, :, :] = (255, 51, 0)
    image[0, 2:-2, 2:-2] = 77
    np.testing.assert_allclose(metrics.border_colour(image), [[1.0, 0.2, 0.0]])
    tiny = np.full((1, 8, 8, 3), 255, np.uint8)
    tiny[0, 1:-1, 1:-1] = 0
    np.testing.assert_allclose(metrics.border_colour(tiny), [[1.0, 1.0, 1.0]])


def test_right_ground_compares_within_the_group_and_knows_when_it_cannot():
    def flat(*colour):
        return np.full((16, 16, 3), colour, np.uint8)

    group = np.stack([flat(255, 255, 255), flat(20, 60, 220), flat(250, 220, 40)])
    assert metrics.right_ground(flat(40, 70, 200), group, own=1) is True
    assert metrics.right_ground(flat(240, 240, 240), group, own=1) is False
    assert metrics.right_ground(flat(0, 0, 0), group[:1], own=0) is None
    assert metrics.right_ground(flat(0, 0, 0), np.stack([flat(250, 250, 250), flat(255, 255, 255)]), own=0) is None


def test_calibration_error_equals_a_loop_over_bins():
    g = np.random.default_rng(0)
    confidence, right = g.random(500), g.random(500) < 0.6
    expected = 0.0
    for b in range(15):
        rows = [i for i in range(500) if b / 15 < confidence[i] <= (b + 1) / 15]
        if rows:
            accuracy, mean = sum(bool(right[i]) for i in rows) / len(rows), sum(float(confidence[i]) for i in rows) / len(rows)
            expected += len(rows) / 500 * abs(accuracy - mean)
    assert metrics.calibration_error(confidence, right) == pytest.approx(expected, rel=1e-12)
    assert expected > 0.1


def test_a_classifier_that_means_what_it_says_has_no_calibration_error():
    g = np.random.default_rng(1)
    confidence = g.uniform(0.1, 1.0, 400_000)
    assert metrics.calibration_error(confidence, g.random(400_000) < confidence) < 0.005  # 1/√(rows of a bin)
    # Three in four right at 75 %: none at all. Ninety per cent sure of what is right six times in ten: the difference.
    assert metrics.calibration_error(np.full(8, 0.75), np.arange(8) < 6) == 0
    assert metrics.calibration_error(np.full(10, 0.9), np.arange(10) < 6) == pytest.approx(0.3)
    assert metrics.calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0
    assert math.isnan(metrics.calibration_error(np.zeros(0), np.zeros(0, bool)))
