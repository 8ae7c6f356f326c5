"""k-means against scikit-learn and brute force, and its promise of equal bits; balancing against exhaustive search."""

from __future__ import annotations

import itertools
from typing import ClassVar

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from paris_ray.config import ConfigError
from paris_ray.data import kmeans as km
from paris_ray.data.balance import balance, coarse_clusters


def stored(n: int, width: int, seed: int = 0) -> np.ndarray:
    """Embeddings as the corpus holds them: float16, uneven lengths."""
    g = np.random.default_rng(seed)
    return (g.standard_normal((n, width)) * g.uniform(0.5, 3.0, (n, 1)) + 0.3).astype(np.float16)


def mixture(k: int, each: int, width: int, spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng(seed)
    centres = g.standard_normal((k, width))
    truth = np.repeat(np.arange(k), each)
    order = g.permutation(len(truth))
    rows = centres[truth] + spread * g.standard_normal((len(truth), width))
    return rows[order].astype(np.float16), truth[order]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_inertia_is_scikit_learns_from_the_same_start(metric: str) -> None:
    x = km.prepare(stored(3000, 24), metric, 3000)
    start = x[np.random.default_rng(1).choice(3000, 20, replace=False)]
    rows = km.Rows([x])
    fit = km.lloyd(rows, start, 300)
    reference = KMeans(20, init=start.astype(np.float64), n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(x.astype(np.float64))
    assert fit.converged
    assert fit.inertia[-1] == pytest.approx(reference.inertia_, rel=1e-5)
    assert (rows.labels == reference.labels_).mean() > 0.98
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(fit.inertia))
    # The first iteration is the assignment to the given start, by brute force in float64.
    d2 = ((x[:, None].astype(np.float64) - start[None]) ** 2).sum(-1)
    assert fit.inertia[0] == pytest.approx(d2.min(1).sum(), rel=1e-7)


def test_each_row_is_with_its_nearest_centroid_and_counts_are_right() -> None:
    x = km.prepare(stored(500, 8, 3), "cosine", 500)
    rows = km.Rows([x])
    fit = km.kmeans(rows, 7, seed=4)
    d2 = ((x[:, None].astype(np.float64) - fit.centroids[None]) ** 2).sum(-1)
    assert (rows.labels == d2.argmin(1)).all()
    assert (fit.counts == np.bincount(rows.labels, minlength=7)).all()
    np.testing.assert_allclose(rows.distances, d2.min(1), atol=1e-5)
    for k in range(7):  # a fixed point: centroids are means
        np.testing.assert_allclose(fit.centroids[k], x[rows.labels == k].astype(np.float64).mean(0), atol=1e-6)


@pytest.mark.parametrize(("k", "width", "spread"), [(8, 16, 0.1), (20, 32, 0.15)])
def test_known_mixtures_are_recovered(k: int, width: int, spread: float) -> None:
    for seed in range(5):
        x, truth = mixture(k, 60, width, spread, seed)
        rows = km.Rows([km.prepare(x, "cosine", len(x))])
        km.kmeans(rows, k, seed)
        assert adjusted_rand_score(truth, rows.labels) >= 0.98


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_bits_do_not_depend_on_how_rows_are_cut(metric: str) -> None:
    n = 2 * km.CHUNK + 777
    x = km.prepare(stored(n, 12), metric, n)

    def run(shards: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, list[float]]:
        rows = km.Rows(shards)
        fit = km.kmeans(rows, 16, seed=5, max_iterations=12)
        return fit.centroids, rows.labels, fit.inertia

    whole = run([x])
    for cuts in ([100, 5000], [1, 2, 3, 4097, 6000, 8200]):
        parts = run(np.split(x, cuts))
        assert whole[0].tobytes() == parts[0].tobytes()
        assert whole[1].tobytes() == parts[1].tobytes()
        assert whole[2] == parts[2]


class Scattered:
    """Rows in several places, whose parts are added in any order."""

    def __init__(self, x: np.ndarray, cuts: list[int], order: list[int]):
        self.total = len(x)
        self.parts = [km.Rows([part], start) for part, start in zip(np.split(x, cuts), [0, *cuts], strict=True)]
        self.order = order

    def assign(self, centroids: np.ndarray) -> km.Partial:
        partials = [part.assign(centroids) for part in self.parts]
        total = partials[self.order[0]]
        for i in self.order[1:]:
            total = total + partials[i]
        return total

    def farthest(self, n: int) -> np.ndarray:
        found = [part.farthest_indices(n) for part in self.parts]
        distance, index = (np.concatenate(column) for column in zip(*found, strict=True))
        return self.take(index[np.lexsort((index, -distance))[:n]])

    def take(self, indices: np.ndarray) -> np.ndarray:
        return np.concatenate([part.x for part in self.parts])[indices]

    def squares(self) -> list[float]:
        return [value for i in self.order for value in self.parts[i].squares()]


def test_bits_do_not_depend_on_where_rows_are_or_in_which_order_parts_are_added() -> None:
    n = 5 * km.CHUNK + 99
    x = km.prepare(stored(n, 8, 2), "cosine", n)
    here = km.Rows([x])
    there = Scattered(x, [km.CHUNK, 3 * km.CHUNK], [2, 0, 1])
    # Two starts alike: one cluster is empty at first, so re-seeding is compared too.
    start = x[[10, 10, 300, 4000, 9000, 20000]]
    a, b = km.lloyd(here, start, 20), km.lloyd(there, start, 20)
    assert a.centroids.tobytes() == b.centroids.tobytes()
    assert a.inertia == b.inertia
    assert (a.counts == b.counts).all()
    assert (here.labels == np.concatenate([part.labels for part in there.parts])).all()


def test_sums_on_the_grid_are_exact() -> None:
    x = km.prepare(stored(4000, 6, 9), "cosine", 4000)
    exact = [sum(int(v) for v in np.rint(x[:, d].astype(np.float64) / km.GRID)) for d in range(6)]
    part = km.Rows([x]).assign(np.zeros((1, 6), np.float32))
    assert [int(v) for v in part.sums[0] / km.GRID] == exact
    half = stored(100, 6)
    assert (km.prepare(half, "euclidean", 100) == half.astype(np.float32)).all()
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-6)


def test_ties_go_to_the_lower_index() -> None:
    x = np.array([[0.0, 1.0], [0.0, -1.0], [2.0, 0.0]], np.float32)
    rows = km.Rows([x])
    rows.assign(np.array([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], np.float32))
    assert rows.labels.tolist() == [0, 0, 0]


def test_an_empty_cluster_restarts_at_the_farthest_row() -> None:
    x = np.array([[0.0], [0.1], [10.0], [10.1], [-7.0]], np.float32)
    fit = km.lloyd(km.Rows([x]), np.array([[0.0], [10.0], [99.0]], np.float32), 10)
    assert sorted(fit.centroids[:, 0].tolist()) == pytest.approx([-7.0, 0.05, 10.05])
    assert fit.counts.min() == 1
    assert fit.converged


def test_fewer_distinct_rows_than_clusters_ends_and_leaves_one_empty() -> None:
    x = km.prepare(np.repeat(stored(3, 5), 4, axis=0), "cosine", 12)
    fit = km.kmeans(km.Rows([x]), 4, seed=0, max_iterations=50)
    assert fit.converged
    assert sorted(fit.counts.tolist()) == [0, 4, 4, 4]


def test_tiny_sets_reach_the_best_of_all_partitions() -> None:
    for seed in range(5):
        x, _ = mixture(3, 3, 2, 0.1, seed)
        wide = x.astype(np.float64)

        def cost(labels: tuple[int, ...], rows: np.ndarray = wide) -> float:
            groups = [rows[np.array(labels) == k] for k in set(labels)]
            return sum(((g - g.mean(0)) ** 2).sum() for g in groups)

        best = min(cost(labels) for labels in itertools.product(range(3), repeat=8) for labels in [(0, *labels)])
        found = min(km.kmeans(km.Rows([km.prepare(x, "euclidean", 9)]), 3, s).inertia[-1] for s in range(4))
        assert found == pytest.approx(best, rel=1e-5, abs=1e-9)


def test_plus_plus_is_a_draw_of_rows_by_seed() -> None:
    x = km.prepare(stored(400, 6), "cosine", 400)
    first = km.plus_plus(x, 10, 3)
    assert (km.plus_plus(x, 10, 3) == first).all()
    assert not (km.plus_plus(x, 10, 4) == first).all()
    assert len({row.tobytes() for row in first}) == 10
    assert {row.tobytes() for row in first} <= {row.tobytes() for row in x}
    picked = km.sample_indices(10**6, 4, 7)
    assert len(set(picked.tolist())) == 4 * km.SAMPLE_PER_CENTROID
    assert (np.diff(picked) > 0).all()
    assert picked.max() < 10**6


def test_bad_input_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match="3 rows cannot make 4 clusters"):
        km.kmeans(km.Rows([np.eye(3, dtype=np.float32)]), 4, 0)
    with pytest.raises(ValueError, match=r"row 1 is zero.*euclidean"):
        km.prepare(np.array([[1.0], [0.0]]), "cosine", 2)
    with pytest.raises(ValueError, match="row 1 is not finite"):
        km.prepare(np.array([[1.0], [np.inf]]), "cosine", 2)
    with pytest.raises(ValueError, match="no exact float64 sum"):
        km.prepare(np.array([[60000.0]]), "euclidean", 10_000)
    with pytest.raises(ValueError, match="multiple of 4096"):
        km.Rows([np.eye(2, dtype=np.float32)], start=5)


class TestBalance:
    points: ClassVar = np.random.default_rng(0).standard_normal((9, 2))

    def exhaustive(self, weights: np.ndarray, k: int, cap: float) -> float:
        best = np.inf
        for tail in itertools.product(range(k), repeat=len(self.points) - 1):
            labels = np.array((0, *tail))
            if np.bincount(labels, weights, k).max() > cap or len(set(labels.tolist())) < k:
                continue
            best = min(best, sum(((g - g.mean(0)) ** 2).sum() for g in (self.points[labels == j] for j in range(k))))
        return best

    @pytest.mark.parametrize("weights", [[3, 1, 4, 1, 5, 9, 2, 6, 5], [10, 1, 1, 1, 1, 1, 1, 1, 10]])
    def test_within_the_cap_and_near_the_least_cost(self, weights: list[int]) -> None:
        w = np.array(weights)
        cap = 1.2 * w.sum() / 3
        fine = self.points.astype(np.float32)
        coarse = coarse_clusters(fine, w, 3, seed=0, max_iterations=50, max_share=1.2)
        loads = np.bincount(coarse.fine_to_coarse, w, 3)
        assert loads.max() <= cap
        assert coarse.over == ()
        cost = ((self.points - coarse.centroids[coarse.fine_to_coarse]) ** 2).sum()
        least = self.exhaustive(w, 3, cap)
        assert least - 1e-6 <= cost <= 1.35 * least

    def test_without_a_cap_it_is_plain_k_means(self) -> None:
        coarse = coarse_clusters(self.points.astype(np.float32), np.ones(9, np.int64), 3, 0, 50, None)
        reference = KMeans(3, n_init=50, random_state=0).fit(self.points)
        assert coarse.inertia[-1] == pytest.approx(reference.inertia_, rel=1e-5)
        assert adjusted_rand_score(reference.labels_, coarse.fine_to_coarse) == 1.0

    def test_many_clusters(self) -> None:
        g = np.random.default_rng(3)
        points, w = g.standard_normal((64, 16)).astype(np.float32), g.integers(5, 60, 64)
        coarse = coarse_clusters(points, w, 8, 0, 100, 1.1)
        assert np.bincount(coarse.fine_to_coarse, w, 8).max() <= 1.1 * w.sum() / 8
        # Refining paid: cheaper than any order-of-arrival filling within the same cap.
        order_cost = min(self.fill(points, w, seed) for seed in range(20))
        assert ((points - coarse.centroids[coarse.fine_to_coarse]) ** 2).sum() < order_cost

    def fill(self, points: np.ndarray, w: np.ndarray, seed: int) -> float:
        labels = np.zeros(len(w), int)
        for i, point in enumerate(np.random.default_rng(seed).permutation(len(w))):
            labels[point] = i % 8
        return float(sum(((points[labels == k] - points[labels == k].mean(0)) ** 2).sum() for k in range(8)))

    def test_one_fine_cluster_above_the_cap_is_said(self) -> None:
        with pytest.raises(ConfigError, match=r"fine cluster 4 alone has 90.*raise partition.fine \(now 5\).*at least 2\.65"):
            coarse_clusters(np.eye(5, dtype=np.float32), np.array([3, 3, 3, 3, 90]), 3, 0, 50, 1.5)

    def test_what_cannot_be_packed_is_named_and_ends(self) -> None:
        labels, _, over = balance(np.eye(3), np.array([10, 10, 10]), np.eye(3)[:2], cap=15)
        assert len(over) == 1
        assert np.bincount(labels, minlength=2)[over[0]] == 2
