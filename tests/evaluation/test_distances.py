"""Distances of sets against closed forms, brute force, and torch-fidelity's own numbers on the same features."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from paris_ray.evaluation import distances, intervals


def features(n, width, seed, shift=0.0, scale=1.0):
    g = np.random.default_rng(seed)
    mixing = np.random.default_rng(77).normal(size=(width, width)) / width**0.5
    return (g.normal(size=(n, width)) @ mixing * scale + shift).astype(np.float32)


def kernel_distance(a, b):
    return distances.Reference(a).kernel(b)


def test_frechet_distance_of_gaussians_in_closed_form():
    g = np.random.default_rng(0)
    # Of diagonal covariances: |Δμ|² + Σ(σ_a − σ_b)².
    mean_a, mean_b, a, b = (g.random(6) for _ in range(4))
    expected = np.square(mean_a - mean_b).sum() + np.square(a - b).sum()
    assert distances.frechet(mean_a, np.diag(a**2), mean_b, np.diag(b**2)) == pytest.approx(expected, rel=1e-12)
    # The same in turned axes, where the covariances still commute.
    turn = np.linalg.qr(g.normal(size=(6, 6)))[0]
    found = distances.frechet(mean_a, turn @ np.diag(a**2) @ turn.T, mean_b, turn @ np.diag(b**2) @ turn.T)
    assert found == pytest.approx(expected, rel=1e-9)
    # And where they do not: with SciPy's root of the product.
    wide, other = (x @ x.T for x in (g.normal(size=(6, 9)), g.normal(size=(6, 9))))
    root = np.trace(sqrtm(wide @ other)).real
    assert distances.frechet(mean_a, wide, mean_a, other) == pytest.approx(np.trace(wide) + np.trace(other) - 2 * root, rel=1e-8)
    assert distances.frechet(mean_a, wide, mean_a, wide) == pytest.approx(0, abs=1e-8)
    # Covariances that are singular: two points against one.
    assert distances.frechet(np.zeros(2), np.diag([4.0, 0.0]), np.array([0.0, 3.0]), np.zeros((2, 2))) == pytest.approx(13)


def test_frechet_distance_equals_torch_fidelitys():
    a, b = features(300, 20, 1), features(200, 20, 2, shift=0.3, scale=1.2)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)), verbose=False)[KEY_METRIC_FID]
    assert distances.frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)
    assert theirs > 1


def test_along_principal_axes_only_what_lies_along_them_counts():
    g = np.random.default_rng(3)
    a = g.normal(size=(400, 5)) * [5, 4, 0.1, 0.1, 0.1]
    moved = a + np.array([0, 0, 2, 2, 2])
    assert distances.frechet_distance(a, moved) == pytest.approx(12, rel=1e-9)
    assert distances.frechet_distance(a, moved, axes=2) == pytest.approx(0, abs=0.05)
    assert distances.frechet_distance(a, moved, axes=5) == pytest.approx(12, rel=1e-9)
    with pytest.raises(ValueError, match="axes: 6 must lie between 1 and the features' width, 5"):
        distances.frechet_distance(a, moved, axes=6)


def test_kernel_distance_equals_two_loops_and_torch_fidelitys(monkeypatch):
    a, b = features(23, 6, 1), features(17, 6, 2, shift=0.5)

    def kernel(x, y):
        return (sum(float(p) * float(q) for p, q in zip(x, y, strict=True)) / 6 + 1) ** 3

    def within(x):
        return sum(kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j) / (len(x) * (len(x) - 1))

    expected = within(a) + within(b) - 2 * sum(kernel(x, y) for x in a for y in b) / (23 * 17)
    for block in (1024, 5):
        monkeypatch.setattr(distances, "_BLOCK", block)
        assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)
    # Theirs, with one subset of all rows.
    a, b = features(150, 16, 3), features(150, 16, 4, shift=0.2)
    theirs = kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), kid_subsets=1, kid_subset_size=150, verbose=False)
    assert kernel_distance(a, b) == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-4)


def test_what_depends_on_the_reference_alone_is_worked_out_once(monkeypatch):
    root, within, asked = distances._root, distances._within, []
    monkeypatch.setattr(distances, "_root", lambda covariance: asked.append("root") or root(covariance))
    monkeypatch.setattr(distances, "_within", lambda one: asked.append(len(one)) or within(one))
    reference = distances.Reference(features(40, 4, 0))
    for seed in (1, 2, 3):
        assert reference.frechet(features(30, 4, seed)) == pytest.approx(distances.frechet_distance(features(40, 4, 0), features(30, 4, seed)))
        reference.kernel(features(30, 4, seed))
    assert asked.count("root") == 1 + 3  # the function's own
    assert asked.count(40) == 1


def test_kernel_distance_is_unbiased():
    """Of two halves of one distribution: zero on average, on both sides of it."""
    found = np.array([kernel_distance(features(20, 4, seed), features(20, 4, 1000 + seed)) for seed in range(400)])
    assert abs(found.mean()) < 4 * found.std() / 20
    assert (found < 0).mean() == pytest.approx(0.5, abs=0.25)
    biased = np.mean([np.mean((features(20, 4, s) @ features(20, 4, s).T / 4 + 1) ** 3) for s in range(50)])
    assert biased > 1  # there is something to be biased by


def brute_coverage(real, made, k):
    def distance(x, y):
        return float(np.sqrt(np.square(x.astype(float) - y.astype(float)).sum()))

    def radius(rows, i):
        return sorted(distance(rows[i], rows[j]) for j in range(len(rows)) if j != i)[k - 1]

    own, theirs = [radius(real, i) for i in range(len(real))], [radius(made, j) for j in range(len(made))]
    inside = [[distance(real[i], made[j]) <= own[i] for j in range(len(made))] for i in range(len(real))]
    precision = np.mean([any(inside[i][j] for i in range(len(real))) for j in range(len(made))])
    recall = np.mean([any(distance(real[i], made[j]) <= theirs[j] for j in range(len(made))) for i in range(len(real))])
    density = sum(map(sum, inside)) / (k * len(made))
    return precision, recall, density, np.mean([any(row) for row in inside])


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_the_rest_against_brute_force(monkeypatch, k):
    real, made = features(60, 3, 1), features(45, 3, 2, shift=0.6, scale=0.8)
    for block in (1024, 7):
        monkeypatch.setattr(distances, "_BLOCK", block)
        found = distances.precision_recall(real, made, k)
        assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(brute_coverage(real, made, k))
    assert 0 < found.recall < 1
    assert 0 < found.precision <= 1


def test_precision_and_recall_equal_torch_fidelitys():
    real, made = features(200, 8, 5), features(150, 8, 6, shift=0.4, scale=0.9)
    theirs = prc_features_to_metric(torch.from_numpy(made), torch.from_numpy(real), prc_neighborhood=3, verbose=False)
    found = distances.precision_recall(real, made, 3)
    assert (found.precision, found.recall) == pytest.approx((theirs[KEY_METRIC_PRECISION], theirs[KEY_METRIC_RECALL]), abs=1e-6)
    assert found.precision != found.recall


def test_a_copy_covers_all_and_a_stranger_nothing():
    real = features(50, 4, 1)
    same = distances.precision_recall(real, real.copy(), 5)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert same.density > 1  # each row lies in its own ball and in those whose near neighbour it is
    far = distances.precision_recall(real, real + 1000, 5)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    # One mode of two: precise, but half is missing.
    two = np.concatenate([real, real + 100])
    half = distances.precision_recall(two, features(100, 4, 1), 3)
    assert half.precision > 0.8
    assert half.recall == half.coverage == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ValueError, match="with k = 5 more than 5 of each"):
        distances.precision_recall(real, real[:5], 5)


# -- pictures that get worse ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures():
    from paris_ray.config import ScenesSource
    from paris_ray.data.scenes import Scenes

    source = Scenes(ScenesSource(), 32)
    return np.stack([source.picture("seen", i) for i in range(300)])


def encode(images):
    """A random network of one layer: enough to see colours and edges."""
    g = torch.Generator().manual_seed(0)
    kernels = torch.randn(24, 3, 5, 5, generator=g)
    x = torch.from_numpy(np.asarray(images, np.float32) / 255).permute(0, 3, 1, 2)
    maps = torch.nn.functional.conv2d(x - x.mean(), kernels).relu()
    return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1).numpy()


@pytest.mark.parametrize("statistic", [distances.frechet_distance, kernel_distance])
def test_distances_grow_with_blur_noise_and_mixing(pictures, statistic):
    real, noise = encode(pictures), np.random.default_rng(0).normal(size=pictures.shape)
    ladders = {
        "blur": [gaussian_filter(pictures.astype(float), (0, sigma, sigma, 0)) for sigma in (0.01, 0.6, 1, 2, 4)],
        "noise": [np.clip(pictures + sigma * noise, 0, 255) for sigma in (0, 10, 25, 50, 100)],
        "mixing": [np.concatenate([pictures[: 300 - n], np.full((n, 32, 32, 3), 128)]) for n in (0, 30, 80, 150, 300)],
    }
    for name, steps in ladders.items():
        found = [statistic(real, encode(step)) for step in steps]
        assert all(later > earlier for earlier, later in itertools.pairwise(found)), (name, found)


def test_halves_of_a_set_lie_at_its_floor():
    width, n = 6, 2000
    rows = np.random.default_rng(2).normal(size=(n, width))
    floor = intervals.split_floor(distances.frechet_distance, rows, seed=0, repeats=20)
    # Of two samples of n/2 from N(0, I): D·(2/n + 2/n) for the means, and a quarter of the covariances' expected squared difference.
    expected = width * (4 / n) * (1 + (width + 1) / 4)
    assert floor.least < expected < floor.most
    assert floor.value == pytest.approx(expected, rel=0.25)
    fresh = np.random.default_rng(3).normal(size=(n, width))
    assert floor.least * 0.5 < distances.frechet_distance(rows[: n // 2], fresh[: n // 2]) < floor.most * 1.5
    assert distances.frechet_distance(rows, fresh + 0.2) > 3 * floor.most
    # As many rows as the model made: fewer, so a higher floor.
    assert intervals.split_floor(distances.frechet_distance, rows, seed=0, rows=100).value > 3 * floor.value
    assert intervals.split_floor(distances.frechet_distance, rows, seed=0) == intervals.split_floor(distances.frechet_distance, rows, 0)


def test_diversity_equals_a_loop_over_pairs():
    rows = features(9, 5, 1)
    prompts = ["a", "b", "a", "c", "b", "a", "b", "b", "d"]

    def distance(x, y):
        return 1 - float(np.dot(x, y) / np.sqrt(np.dot(x, x) * np.dot(y, y)))

    expected = [np.mean([distance(rows[i], rows[j]) for i, j in itertools.combinations(own, 2)]) for own in ([0, 2, 5], [1, 4, 6, 7])]
    np.testing.assert_allclose(distances.diversity(rows, prompts), expected, rtol=1e-5)
    same = np.repeat(rows[:1], 4, 0)
    np.testing.assert_allclose(distances.diversity(same, ["x"] * 4), [0], atol=1e-6)
    assert len(distances.diversity(rows[:2], ["a", "b"])) == 0


def test_shapes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="at least 2 rows"):
        distances.moments(np.ones((1, 3)))
    with pytest.raises(ValueError, match="same encoder"):
        distances.frechet_distance(np.ones((3, 2)), np.ones((3, 4)))
    with pytest.raises(ValueError, match="needs 2 of each"):
        kernel_distance(np.ones((1, 2)), np.ones((3, 2)))
    with pytest.raises(ValueError, match="same pictures"):
        distances.diversity(np.ones((2, 2)), ["a"])
