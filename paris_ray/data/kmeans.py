"""Exact k-means for rows in many places: Lloyd's algorithm with k-means++ (Lloyd 1982; Arthur & Vassilvitskii 2007). NumPy only.

The result has the same bits however the rows are cut into files, shards or actors (on one kind of machine, at one number of BLAS threads):

- rows have a global index, and distances are computed in chunks of :data:`CHUNK` rows whose bounds are multiples of it, the last one padded:
  a row is always at the same place of a matrix product of the same shape;
- :func:`prepare` puts rows on a grid of 2⁻²⁴, on which float16 lies anyway, so that sums of them in float64 are exact and have no order;
- what decides (stop, re-seeding) is made of integers and of comparisons with ties to the lower index, never of a sum of distances.

``cosine`` means Euclidean k-means on rows scaled to unit length; centroids are plain means of them and are not scaled again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from paris_ray import rng

CHUNK = 4096
"""Rows in one matrix product."""

GRID = 2.0**-24
"""Spacing of all float16 numbers; see :func:`prepare`."""

SAMPLE_PER_CENTROID = 128
"""Rows for k-means++, per centroid: it takes one pass for each centroid, so it sees a sample of a large corpus."""

CHANGED_SHARE = 100_000
"""Lloyd stops when at most one row in this many has changed its cluster: none at all below that many rows."""

F32 = NDArray[np.float32]


def prepare(rows: NDArray[np.floating], metric: str, total: int) -> F32:
    """Rows as stored → rows as clustered: unit length for ``cosine``, and on the grid on which float64 sums are exact.

    Args:
        rows: (N, D), finite.
        metric: ``cosine`` or ``euclidean``.
        total: rows in the whole corpus, here and elsewhere.

    Raises:
        ValueError: a row is not finite or has no direction, or the values are too large for exact sums of ``total`` rows.
    """
    wide = rows.astype(np.float64)
    if not np.isfinite(wide).all():
        raise ValueError(f"embedding: row {int(np.argmin(np.isfinite(wide).all(1)))} is not finite; embed the corpus again")
    if metric == "cosine":
        norms = np.sqrt(np.einsum("nd,nd->n", wide, wide))
        if (norms == 0).any():
            raise ValueError(f"embedding: row {int(np.argmin(norms))} is zero and has no direction; use partition.metric=euclidean")
        wide /= norms[:, None]
    largest = float(np.abs(wide).max(initial=0.0))
    if total * largest >= 2.0**53 * GRID:
        raise ValueError(f"embedding: {total} rows of values up to {largest:g} have no exact float64 sum (limit 2²⁹); use partition.metric=cosine")
    return (np.rint(wide / GRID) * GRID).astype(np.float32)


@dataclass(frozen=True)
class Partial:
    """What some rows add to an iteration.

    Attributes:
        sums: sum of the rows of each cluster, (K, D) float64.
        counts: rows of each cluster, (K,) int64.
        changed: rows that are in another cluster than before.
    """

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]
    changed: int

    def __add__(self, other: Partial) -> Partial:
        return Partial(self.sums + other.sums, self.counts + other.counts, self.changed + other.changed)


class RowSet(Protocol):
    """Rows wherever they live."""

    total: int

    def assign(self, centroids: F32) -> Partial:
        """Put every row into the cluster of its nearest centroid (K, D)."""
        ...

    def farthest(self, n: int) -> F32:
        """The ``n`` rows farthest from their centroids at the last :meth:`assign`, (n, D); ties to the lower index, none at distance zero."""
        ...

    def take(self, indices: NDArray[np.int64]) -> F32:
        """Rows by global index."""
        ...

    def squares(self) -> list[float]:
        """Sum of squares of each chunk."""
        ...


class Rows:
    """Rows in memory: all of the corpus, or the part of it that starts at global index ``start``.

    Args:
        shards: arrays (n, D) float32, in global order, cut anywhere.
        start: global index of the first row, a multiple of :data:`CHUNK`.
    """

    def __init__(self, shards: Sequence[F32], start: int = 0):
        if start % CHUNK:
            raise ValueError(f"start: {start} must be a multiple of {CHUNK}, so that chunks are the same wherever rows live")
        self.x = shards[0] if len(shards) == 1 else np.concatenate(shards)
        self.start, self.total = start, len(self.x)
        self.labels = np.full(self.total, -1, np.int32)
        # Squared distance to the row's centroid.
        self.distances = np.zeros(self.total, np.float32)
        self._x2 = np.einsum("nd,nd->n", self.x, self.x, dtype=np.float64)

    def assign(self, centroids: F32) -> Partial:
        k, width = centroids.shape
        c2 = np.einsum("kd,kd->k", centroids, centroids, dtype=np.float64).astype(np.float32)
        minus_two_c = np.ascontiguousarray(-2.0 * centroids.T)
        sums, counts, changed = np.zeros((k, width)), np.zeros(k, np.int64), 0
        for low in range(0, self.total, CHUNK):
            block = self.x[low : low + CHUNK]
            n = len(block)
            if n < CHUNK:
                block = np.concatenate([block, np.zeros((CHUNK - n, width), np.float32)])
            scores = (block @ minus_two_c + c2)[:n]  # d² − x²
            labels = scores.argmin(1)
            here = slice(low, low + n)
            self.distances[here] = np.maximum(self._x2[here] + scores[np.arange(n), labels], 0.0)
            changed += int((labels != self.labels[here]).sum())
            self.labels[here] = labels
            order = np.argsort(labels, kind="stable")
            found, first, size = np.unique(labels[order], return_index=True, return_counts=True)
            sums[found] += np.add.reduceat(block[order].astype(np.float64), first, axis=0)
            counts[found] += size
        return Partial(sums, counts, changed)

    def farthest_indices(self, n: int) -> tuple[F32, NDArray[np.int64]]:
        """Distances and global indices of the ``n`` farthest rows, farthest first."""
        order = np.argsort(-self.distances, kind="stable")[:n]
        # A row's distance to a centroid equal to it is rounding, not distance.
        order = order[self.distances[order] > 1e-6 * self._x2[order]]
        return self.distances[order], order + self.start

    def farthest(self, n: int) -> F32:
        return self.take(self.farthest_indices(n)[1])

    def take(self, indices: NDArray[np.int64]) -> F32:
        return self.x[indices - self.start]

    def distances_to(self, centroids: F32, choice: NDArray[np.int64]) -> F32:
        """Squared distance of each row to centroid ``choice[label]``, (N,)."""
        blocks = [slice(low, low + CHUNK) for low in range(0, self.total, CHUNK)]
        return np.concatenate([((self.x[b] - centroids[choice[self.labels[b]]]) ** 2).sum(1) for b in blocks])

    def squares(self) -> list[float]:
        return [float(self._x2[low : low + CHUNK].sum()) for low in range(0, self.total, CHUNK)]


@dataclass(frozen=True)
class Fit:
    """A clustering.

    Attributes:
        centroids: (K, D) float32; at the end each row is with its nearest.
        counts: rows of each cluster, (K,).
        inertia: sum of squared distances at each iteration, never rising but where an empty cluster was re-seeded.
        converged: whether it stopped by itself, before ``max_iterations``.
    """

    centroids: F32
    counts: NDArray[np.int64]
    inertia: list[float]
    converged: bool


def plus_plus(sample: F32, k: int, seed: int) -> F32:
    """Greedy k-means++: each next centroid is the best of 2 + ⌊ln k⌋ rows drawn with probability ∝ squared distance; (n, D) → (k, D)."""
    x2 = np.einsum("nd,nd->n", sample, sample, dtype=np.float64)

    def squared(indices: NDArray[np.int64]) -> NDArray[np.float64]:
        d2 = x2[:, None] + x2[indices] - 2.0 * (sample @ sample[indices].T)
        return np.where(d2 > 1e-6 * (x2[:, None] + x2[indices]), d2, 0.0)

    chosen = [int(rng.generator(seed, "kmeans++", 0).integers(len(sample)))]
    nearest = squared(np.array(chosen))[:, 0]
    trials = 2 + int(math.log(k))
    for j in range(1, k):
        ladder = np.cumsum(nearest)
        draws = rng.generator(seed, "kmeans++", j).random(trials) * ladder[-1]
        tried = np.minimum(np.searchsorted(ladder, draws, side="right"), len(sample) - 1)
        options = np.minimum(nearest[:, None], squared(tried))
        best = int(options.sum(0).argmin())
        chosen.append(int(tried[best]))
        nearest = options[:, best]
    return sample[chosen]


def sample_indices(total: int, k: int, seed: int) -> NDArray[np.int64]:
    """Rows that k-means++ sees: all, or :data:`SAMPLE_PER_CENTROID` per centroid without replacement, ascending."""
    size = k * SAMPLE_PER_CENTROID
    if total <= size:
        return np.arange(total)
    return np.sort(rng.generator(seed, "kmeans-sample", 0).choice(total, size, replace=False))


def lloyd(rows: RowSet, start: F32, max_iterations: int, on_iteration: Callable[[int, float, int], None] | None = None) -> Fit:
    """Lloyd's algorithm from given centroids.

    Stops when at most one row in :data:`CHANGED_SHARE` changed its cluster and none is empty, or after ``max_iterations``. Empty clusters, in the
    order of their index, restart at the rows farthest from their centroids, farthest first.

    Args:
        rows: N rows, N ≥ K.
        start: (K, D).
        max_iterations: limit.
        on_iteration: called with (iteration, inertia, changed rows).
    """
    centroids = start.astype(np.float32)
    squares = math.fsum(rows.squares())
    inertia: list[float] = []
    for iteration in range(max_iterations):
        part = rows.assign(centroids)
        wide = centroids.astype(np.float64)
        # Σ|x − c|² = Σ|x|² + Σ_k (n_k·|c_k|² − 2·c_k·S_k), from exact sums.
        terms = part.counts * np.einsum("kd,kd->k", wide, wide) - 2 * np.einsum("kd,kd->k", wide, part.sums)
        inertia.append(max(squares + math.fsum(terms), 0.0))
        if on_iteration is not None:
            on_iteration(iteration, inertia[-1], part.changed)
        empty = np.flatnonzero(part.counts == 0)
        seeds = rows.farthest(len(empty)) if len(empty) else centroids[:0]
        if part.changed <= rows.total // CHANGED_SHARE and len(seeds) == 0:
            return Fit(centroids, part.counts, inertia, True)
        if iteration + 1 < max_iterations:
            new = np.where(part.counts[:, None] > 0, part.sums / np.maximum(part.counts, 1)[:, None], wide)
            new[empty[: len(seeds)]] = seeds
            centroids = new.astype(np.float32)
    return Fit(centroids, part.counts, inertia, False)


def kmeans(rows: RowSet, k: int, seed: int, max_iterations: int = 100, on_iteration: Callable[[int, float, int], None] | None = None) -> Fit:
    """k-means++ on a bounded sample, then :func:`lloyd` on all rows.

    Raises:
        ValueError: fewer rows than clusters.
    """
    if rows.total < k:
        raise ValueError(f"{rows.total} rows cannot make {k} clusters; give more rows or ask for at most {rows.total} clusters")
    sample = rows.take(sample_indices(rows.total, k, seed))
    return lloyd(rows, plus_plus(sample, k, seed), max_iterations, on_iteration)
