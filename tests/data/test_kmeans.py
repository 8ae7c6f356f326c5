"""k-means against scikit-learn and brute force, and its promise of equal bits; balancing against exhaustive search."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import tracemalloc
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from paris_ray.config import ConfigError
from paris_ray.data import kmeans as km
from paris_ray.data import nearest
from paris_ray.data.balance import RESTARTS, _improve, balance, coarse_clusters
from paris_ray.data.nearest import BLOCK, GRID


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


def rows_of(x: np.ndarray, metric: str = "cosine", **how: Any) -> km.Rows:
    return km.Rows(x, nearest.scales(x, metric, len(x)), **how)


def real(x: np.ndarray, metric: str = "cosine") -> np.ndarray:
    """Rows as clustered, float64, without the code's own arithmetic."""
    wide = x.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True) if metric == "cosine" else wide


BACKENDS = [name for name in ("numpy", "torch", "faiss") if importlib.util.find_spec(name)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_inertia_is_scikit_learns_from_the_same_start(metric: str, backend: str) -> None:
    x = stored(3000, 24)
    rows = rows_of(x, metric, backend=backend)
    start = rows.take(np.random.default_rng(1).choice(3000, 20, replace=False))
    fit = km.lloyd(rows, km.State(start), 300)
    wide = real(x, metric)
    reference = KMeans(20, init=start.astype(np.float64), n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(wide)
    assert fit.converged
    assert fit.inertia[-1] == pytest.approx(reference.inertia_, rel=1e-5)
    assert (rows.labels(fit.centroids) == reference.labels_).mean() >= 0.995
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(fit.inertia))
    # The first iteration is the assignment to the given start, by brute force in float64.
    d2 = ((wide[:, None] - start[None]) ** 2).sum(-1)
    assert fit.inertia[0] == pytest.approx(d2.min(1).sum(), rel=1e-7)


def test_each_row_is_with_its_nearest_centroid_and_counts_are_right() -> None:
    x = stored(500, 8, 3)
    rows = rows_of(x)
    fit = km.kmeans(rows, 7, seed=4)
    d2 = ((real(x)[:, None] - fit.centroids[None]) ** 2).sum(-1)
    labels = rows.labels(fit.centroids)
    assert (labels == d2.argmin(1)).all()
    assert (fit.counts == np.bincount(labels, minlength=7)).all()
    np.testing.assert_allclose(rows.distances(labels, fit.centroids), d2.min(1), atol=1e-6)
    farthest = np.sort(d2.min(1))[::-1][:5]
    np.testing.assert_allclose(rows.farthest_keys(5, fit.centroids)[0], farthest, atol=1e-6)
    for k in range(7):  # a fixed point: centroids are means
        np.testing.assert_allclose(fit.centroids[k], real(x)[labels == k].mean(0), atol=1e-6)


@pytest.mark.parametrize(("k", "width", "spread"), [(8, 16, 0.1), (20, 32, 0.15)])
def test_known_mixtures_are_recovered(k: int, width: int, spread: float) -> None:
    for seed in range(5):
        x, truth = mixture(k, 60, width, spread, seed)
        rows = rows_of(x)
        fit = km.kmeans(rows, k, seed)
        assert adjusted_rand_score(truth, rows.labels(fit.centroids)) >= 0.98


class Scattered:
    """Rows in several places, in any order, whose parts are added in any order."""

    def __init__(self, x: np.ndarray, metric: str, places: list[np.ndarray], backend: str, order: list[int]):
        self.total, self.places = len(x), places
        scale = nearest.scales(x, metric, len(x))
        self.parts = [km.Rows(x[p], scale[p], p.astype(np.int32), backend=backend, threads=1 + i % 2) for i, p in enumerate(places)]
        self.order = order
        self.whole = km.Rows(x, scale)

    def assign(self, centroids: np.ndarray, previous: np.ndarray | None) -> km.Partial:
        partials = [part.assign(centroids, previous) for part in self.parts]
        total = partials[self.order[0]]
        for i in self.order[1:]:
            total = total + partials[i]
        return total

    def farthest(self, n: int, centroids: np.ndarray) -> np.ndarray:
        found = [part.farthest_keys(n, centroids) for part in self.parts]
        distance, key = (np.concatenate(column) for column in zip(*found, strict=True))
        return self.take(key[np.lexsort((key, -distance))[:n]])

    def take(self, keys: np.ndarray) -> np.ndarray:
        return self.whole.at(keys)

    def squares(self) -> int:
        return sum(self.parts[i].squares() for i in self.order)

    def labels(self, centroids: np.ndarray) -> np.ndarray:
        out = np.empty(self.total, np.int32)
        for part, place in zip(self.parts, self.places, strict=True):
            out[place] = part.labels(centroids)
        return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_bits_depend_neither_on_the_order_of_rows_nor_on_where_they_are_nor_on_the_backend(metric: str, backend: str) -> None:
    n = BLOCK + 777
    x = stored(n, 12, 2)
    x[5000:5200] = x[:200]  # equal rows: ties among the farthest
    here = rows_of(x, metric)
    # Three starts alike: clusters are empty at first, so re-seeding is compared too.
    start = km.State(here.take(np.array([10, 10, 10, *range(20, 54)])))
    a = km.lloyd(here, start, 8)
    shuffled = np.random.default_rng(0).permutation(n)
    seven = np.split(shuffled, [1, 300, 4097, 6000, 6001, 12000])
    for places, order in (([shuffled], [0]), (np.split(np.arange(n), [5000, 12288]), [2, 0, 1]), (seven, [3, 6, 0, 2, 1, 5, 4])):
        there = Scattered(x, metric, places, backend, order)
        b = km.lloyd(there, start, 8)
        assert a.centroids.tobytes() == b.centroids.tobytes()
        assert a.inertia == b.inertia
        assert (a.counts == b.counts).all()
        assert (here.labels(a.centroids) == there.labels(b.centroids)).all()
        mixed = km.Rows(x[shuffled], here.scale[shuffled], shuffled.astype(np.int32), backend=backend)
        assert (km.start(mixed, 5, 1).centroids == km.start(here, 5, 1).centroids).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("width", "k"), [(3, 2), (64, 9), (257, 1024)])
def test_a_label_is_the_nearest_in_float64_wherever_the_row_is(backend: str, width: int, k: int) -> None:
    n = 600  # of no product a multiple
    x = stored(n, width, 4)
    scale = nearest.scales(x, "cosine", n)
    # Centroids in pairs that differ by roundings or not at all, so that float32 cannot tell them apart.
    g = np.random.default_rng(5)
    half = g.standard_normal((k // 2 + 1, width)).astype(np.float32) * 0.1
    centroids = np.repeat(half, 2, axis=0)[:k]
    centroids[1::4] += g.choice(np.float32([-1e-8, 0, 1e-8]), centroids[1::4].shape)
    shuffled = g.permutation(n)
    with nearest.nearest_to(backend, centroids) as find:
        labels, room = find(x, scale)
        assert (find(x[shuffled], scale[shuffled])[0] == labels[shuffled]).all()
        assert (find(x[1:], scale[1:])[0] == labels[1:]).all()
        assert (find(x[321:322], scale[321:322])[0] == labels[321]).all()
    y, c = nearest.prepare(x, scale).astype(np.longdouble) * GRID, centroids.astype(np.longdouble)
    exact = (c**2).sum(1) - 2 * y @ c.T
    assert (labels == exact.argmin(1)).mean() > 0.999  # float64 against longer numbers
    assert (exact[np.arange(n), labels] - exact.min(1)).max() < 1e-15
    assert len(set(labels.tolist())) > 1
    nearest_two = np.partition(np.sqrt(((y[:, None] - c[None, :64]) ** 2).sum(-1)), 1, axis=1) if k <= 64 else None
    if nearest_two is not None:
        assert (room <= nearest_two[:, 1] - nearest_two[:, 0]).all()


def test_what_float32_leaves_undecided_is_little() -> None:
    x = stored(4000, 256, 6)
    scale, centroids = nearest.scales(x, "cosine", 4000), real(stored(200, 256, 7)).astype(np.float32)
    one = nearest._Centroids(centroids)
    y = nearest.prepare(x, scale)
    exact = one.squares - 2 * GRID * y.astype(np.float64) @ one.wide.T
    factor, add = one.factor()
    error = np.abs(y @ factor + add - exact).max(1)
    bound = one.error((y.astype(np.float64) ** 2).sum(1) * GRID**2)
    assert (error <= bound).all()
    worst = 256 * 2.0**-24 * (2 * np.abs(y * GRID) @ np.abs(one.wide.T)).max(1)  # Higham 2002, eq. 3.5, before Cauchy and Schwarz
    assert (worst <= bound).all()
    gap = np.diff(np.partition(exact, 1, axis=1)[:, :2])[:, 0]
    assert (gap <= 2 * bound).mean() < 0.02


def test_sums_on_the_grid_are_exact() -> None:
    x = stored(4000, 6, 9)
    y = nearest.prepare(x, nearest.scales(x, "cosine", 4000))
    assert (y == np.rint(y)).all()
    np.testing.assert_allclose(y * GRID, real(x), atol=1.5 * GRID)
    exact = [sum(int(v) for v in y[:, d]) for d in range(6)]
    rows = rows_of(x)
    part = rows.assign(np.zeros((1, 6), np.float32))
    assert [int(v / GRID) for v in part.sums[0]] == exact
    assert rows.squares() == sum(int(v) ** 2 for v in y.ravel())
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)][:, None]  # subnormal ones too
    assert (nearest.prepare(every, np.ones(len(every), np.float32) / np.float32(GRID)) == every.astype(np.float64) / GRID).all()
    half = stored(100, 6)
    assert (nearest.prepare(half, nearest.scales(half, "euclidean", 100)) * GRID == half.astype(np.float32)).all()


def test_sums_of_differences_are_the_full_sums() -> None:
    n, k = BLOCK + 500, 12
    x = stored(n, 9, 1)
    y = nearest.prepare(x, nearest.scales(x, "cosine", n)).astype(np.int64)
    rows, g = rows_of(x), np.random.default_rng(3)
    previous: np.ndarray | None = None
    before = np.full(n, -1)
    for _ in range(6):
        centroids = g.standard_normal((k, 9)).astype(np.float32)
        part = rows.assign(centroids, previous)
        labels = rows.labels(centroids)
        assert part.changed == (labels != before).sum()
        for c in range(k):
            assert [int(v / GRID) for v in part.sums[c]] == y[labels == c].sum(0).tolist()
            assert part.counts[c] == (labels == c).sum()
        by_labels = rows.sums_by(labels, k)
        assert (by_labels.sums == part.sums).all()
        previous, before = centroids, labels.copy()


def test_rows_that_are_not_looked_at_have_the_label_they_would_get(monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = 4000, 40
    x, _ = mixture(25, n // 25, 8, 0.4, 3)
    rows, wide, looked = rows_of(x), real(x), 0

    @contextlib.contextmanager
    def counting(backend: str, centroids: np.ndarray) -> Iterator[nearest.Nearest]:
        with nearest.nearest_to(backend, centroids) as find:

            def counted(stored: np.ndarray, scale: np.ndarray) -> Any:
                nonlocal looked
                looked += len(stored)
                return find(stored, scale)

            yield counted

    monkeypatch.setattr(km, "nearest_to", counting)
    centroids = rows.take(np.arange(k))
    shares = []
    for step, g in enumerate(map(np.random.default_rng, range(40))):
        looked = 0
        labels = rows.labels(centroids)
        shares.append(looked / n)
        d2 = (centroids.astype(np.float64) ** 2).sum(1) - 2 * wide @ centroids.T.astype(np.float64)
        assert (labels == d2.argmin(1)).all()
        # Means, as in Lloyd's algorithm, and steps of all lengths; now and then one centroid leaps, as one that is seeded anew.
        centroids = km.means(rows.sums_by(labels, k)) + np.float32(10.0 ** -g.integers(1, 5)) * g.standard_normal((k, 8)).astype(np.float32)
        if step % 4 == 0:
            centroids[g.integers(k)] = wide[g.integers(n)]
    assert shares[0] == 1
    assert min(shares) < 0.5


def test_rows_that_forgot_go_on_with_the_same_bits() -> None:
    x = stored(6000, 10, 8)
    start = km.start(rows_of(x), 15, 2)
    states: list[km.State] = []
    told: list[tuple[int, float, int]] = []
    whole = km.lloyd(rows_of(x), start, 9, lambda *what: told.append(what), states.append)
    assert len(states) == 8
    assert [what[0] for what in told] == list(range(9))
    for at in (0, 4, 7):
        again: list[tuple[int, float, int]] = []
        fit = km.lloyd(rows_of(x), states[at], 9, lambda *what, to=again: to.append(what))
        assert fit.centroids.tobytes() == whole.centroids.tobytes()
        assert fit.inertia == whole.inertia
        assert again == told[at + 1 :]


def test_memory_is_the_rows_as_stored() -> None:
    n, width, k = 60_000, 64, 16
    x = stored(n, width)
    scale = nearest.scales(x, "cosine", n)
    tracemalloc.start()
    rows = km.Rows(x.copy(), scale)
    fit = km.lloyd(rows, km.State(rows.take(np.arange(k))), 6)
    rows.distances(rows.labels(fit.centroids), fit.centroids)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # float16 rows, 16 bytes of label, room, scale and key each (8 more, for a moment, to take rows by key), a block of rows, a tile of scores.
    assert peak < n * width * 2 + 24 * n + 5.5e6
    assert peak > n * width * 2


def test_ties_go_to_the_lower_index() -> None:
    x = np.array([[0.0, 1.0], [0.0, -1.0], [2.0, 0.0]], np.float32)
    for backend in BACKENDS:
        rows = rows_of(x, "euclidean", backend=backend)
        assert rows.labels(np.array([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], np.float32)).tolist() == [0, 0, 0]


def test_an_empty_cluster_restarts_at_the_farthest_row() -> None:
    x = np.array([[0.0], [0.1], [10.0], [10.1], [-7.0]], np.float32)
    fit = km.lloyd(rows_of(x, "euclidean"), km.State(np.array([[0.0], [10.0], [99.0]], np.float32)), 10)
    assert sorted(fit.centroids[:, 0].tolist()) == pytest.approx([-7.0, 0.05, 10.05])
    assert fit.counts.min() == 1
    assert fit.converged


def test_of_equally_far_rows_the_lowest_key_is_taken() -> None:
    x = np.array([[0.0], [5.0], [-5.0]], np.float32)
    for keys, first in (([0, 1, 2], 5.0), ([0, 2, 1], -5.0)):
        rows = km.Rows(x, nearest.scales(x, "euclidean", 3), np.array(keys))
        assert rows.farthest(1, np.array([[0.0], [99.0]], np.float32)).tolist() == [[first]]


def test_fewer_distinct_rows_than_clusters_ends_and_leaves_one_empty() -> None:
    x = np.repeat(stored(3, 5), 4, axis=0)
    fit = km.kmeans(rows_of(x), 4, seed=0, max_iterations=50)
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
        found = min(km.kmeans(rows_of(x, "euclidean"), 3, s).inertia[-1] for s in range(4))
        assert found == pytest.approx(best, rel=1e-5, abs=1e-9)


def test_plus_plus_is_a_draw_of_rows_by_seed() -> None:
    x = real(stored(400, 6)).astype(np.float32)
    first = km.plus_plus(x, 10, 3)
    assert (km.plus_plus(x, 10, 3) == first).all()
    assert (km.plus_plus(x, 10, 3, threads=2) == first).all()
    assert not (km.plus_plus(x, 10, 4) == first).all()
    assert len({row.tobytes() for row in first}) == 10
    assert {row.tobytes() for row in first} <= {row.tobytes() for row in x}
    picked = km.sample_keys(10**6, 4, 7)
    assert len(set(picked.tolist())) == 4 * km.SAMPLE_PER_CENTROID
    assert (np.diff(picked) > 0).all()
    assert picked.max() < 10**6
    # A row that counts a thousand times is drawn first as often as its share says (mean 250 of 300, standard deviation 6.5).
    mass = np.array([1000, *[1] * 200])
    drawn = [(km.plus_plus(x[:201], 1, seed, mass)[0] == x[0]).all() for seed in range(300)]
    assert 225 <= sum(drawn) <= 272


def test_weights_count_rows_several_times() -> None:
    x, w = stored(300, 7, 4), np.random.default_rng(0).integers(1, 6, 300)
    start = km.State(rows_of(x).take(np.arange(5)))
    a = km.lloyd(rows_of(x, weights=w), start, 20)
    b = km.lloyd(rows_of(np.repeat(x, w, axis=0)), start, 20)
    assert a.centroids.tobytes() == b.centroids.tobytes()
    assert a.inertia == b.inertia
    assert (a.counts == b.counts).all()


@pytest.mark.parametrize("seed", range(6))
def test_two_levels_are_as_good_as_scikit_learns(seed: int) -> None:
    """The same protocol, k-means and then k-means on its centroids, from as many starts each: no more than 1 % above, by three inertias."""
    x = mixture(60, 30, 16, 0.5, seed)[0]
    wide, rows = real(x), rows_of(x)
    fit = min((km.kmeans(rows, 100, 3 * seed + i) for i in range(3)), key=lambda one: one.inertia[-1])
    coarse = coarse_clusters(fit.centroids, fit.counts, 4, seed, 100, None)
    fine = KMeans(100, n_init=3, random_state=seed).fit(wide)
    upper = KMeans(4, n_init=RESTARTS, random_state=seed).fit(fine.cluster_centers_)
    alone = KMeans(4, n_init=RESTARTS, random_state=seed).fit(fit.centroids.astype(np.float64))
    assert fit.inertia[-1] <= 1.01 * fine.inertia_
    assert coarse.inertia[-1] <= 1.01 * alone.inertia_
    mine, other = (
        ((wide - centroids[labels]) ** 2).sum()  # of the rows, to their coarse centroids
        for centroids, labels in (
            (coarse.centroids, coarse.fine_to_coarse[rows.labels(fit.centroids)]),
            (upper.cluster_centers_, upper.labels_[fine.labels_]),
        )
    )
    assert mine <= 1.01 * other


@pytest.mark.parametrize("seed", range(4))
def test_a_start_from_a_sample_is_as_good_as_one_from_all_rows(seed: int) -> None:
    """As for every large corpus: k-means++ sees 128 rows a centroid, here one in twenty, and small clusters are among them."""
    x, truth = mixture(12, 2560, 16, 0.1, seed)
    kept = np.ones(len(x), bool)
    kept[np.flatnonzero(truth == 0)[256:]] = False  # one cluster has a tenth of the others' rows
    x, truth = x[kept], truth[kept]
    assert len(km.sample_keys(len(x), 12, seed)) == 12 * km.SAMPLE_PER_CENTROID < len(x) / 18
    rows = rows_of(x)
    fit = km.kmeans(rows, 12, seed)
    assert adjusted_rand_score(truth, rows.labels(fit.centroids)) >= 0.98
    reference = KMeans(12, n_init=5, random_state=seed).fit(real(x))
    assert fit.inertia[-1] <= 1.01 * reference.inertia_
    assert km.kmeans(rows, 12, seed, max_iterations=1).inertia[-1] <= 2.5 * reference.inertia_  # one row of each cluster, or nearly


def test_weighted_the_upper_level_is_scikit_learns_with_weights() -> None:
    g = np.random.default_rng(2)
    fine, sizes = g.standard_normal((40, 5)).astype(np.float32), g.integers(1, 200, 40)
    coarse = coarse_clusters(fine, sizes, 4, 0, 100, None, weighted=True)
    reference = KMeans(4, n_init=50, random_state=0).fit(fine, sample_weight=sizes)
    assert coarse.inertia[-1] == pytest.approx(reference.inertia_, rel=0.01)
    for k in range(4):
        mine = coarse.fine_to_coarse == k
        np.testing.assert_allclose(coarse.centroids[k], np.average(fine[mine], 0, sizes[mine]), atol=1e-5)
    # A level of tiny differences around a far point is divided as well as the same around zero.
    shifted = coarse_clusters((1000 + fine * 0.01).astype(np.float32), sizes, 4, 0, 100, None)
    plain = KMeans(4, n_init=50, random_state=0).fit((1000 + fine * 0.01).astype(np.float32).astype(np.float64))
    assert shifted.inertia[-1] == pytest.approx(plain.inertia_, rel=0.01)
    capped = coarse_clusters(fine, sizes, 4, 0, 100, 1.05, weighted=True)
    assert np.bincount(capped.fine_to_coarse, sizes).max() <= 1.05 * sizes.sum() / 4


def test_bad_input_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match="3 rows cannot make 4 clusters"):
        km.kmeans(rows_of(np.eye(3, dtype=np.float32)), 4, 0)
    with pytest.raises(ValueError, match=r"row 1 is zero.*euclidean"):
        nearest.scales(np.array([[1.0], [0.0]]), "cosine", 2)
    with pytest.raises(ValueError, match="row 1 is not finite"):
        nearest.scales(np.array([[1.0], [np.inf]]), "cosine", 2)
    with pytest.raises(ValueError, match="no exact float64 sum"):
        nearest.scales(np.array([[60000.0]]), "euclidean", 10_000)


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

    @pytest.mark.parametrize("seed", range(12))
    def test_each_change_is_the_best_of_all(self, seed: int) -> None:
        """Against all moves and exchanges of pairs, one by one; from starts within the cap and far above it."""
        g = np.random.default_rng(seed)
        n, k = int(g.integers(6, 16)), int(g.integers(2, 5))
        cost, w = g.uniform(0, 10, (n, k)), g.integers(1, 30, n)
        cap = float(g.uniform(1.05, 1.6) * w.sum() / k)
        labels = g.integers(0, 1 + seed % k, n)
        said: list[str] = []
        found = _improve(cost, w, cap, labels.copy(), said.append)

        def worth(of: np.ndarray) -> tuple[float, float]:
            return np.maximum(np.bincount(of, w, k) - np.floor(cap), 0).sum(), cost[np.arange(n), of].sum()

        def neighbours(of: np.ndarray) -> Iterator[np.ndarray]:
            for i, j in itertools.product(range(n), range(k)):
                other = of.copy()
                other[i] = j
                if (np.bincount(of, minlength=k)[of] > 1)[i]:
                    yield other
            for i, j in itertools.combinations(range(n), 2):
                other = of.copy()
                other[[i, j]] = of[[j, i]]
                yield other

        steps = 0
        while worth(best := min(neighbours(labels), key=worth)) < worth(labels):
            labels, steps = best, steps + 1
        assert (found == labels).all()
        assert len(said) == steps > 0

    def test_one_fine_cluster_above_the_cap_is_said(self) -> None:
        with pytest.raises(ConfigError, match=r"fine cluster 4 alone has 90.*raise partition.fine \(now 5\).*at least 2\.65"):
            coarse_clusters(np.eye(5, dtype=np.float32), np.array([3, 3, 3, 3, 90]), 3, 0, 50, 1.5)

    def test_what_cannot_be_packed_is_named_and_ends(self) -> None:
        labels, _, over = balance(np.eye(3), np.array([10, 10, 10]), np.eye(3)[:2], cap=15)
        assert len(over) == 1
        assert np.bincount(labels, minlength=2)[over[0]] == 2
