"""Exact k-means for rows in many places: Lloyd's algorithm with k-means++ (Lloyd 1982; Arthur & Vassilvitskii 2007). NumPy and SciPy.

The result has the same bits however the rows are ordered, or cut into files, shards or actors (on one kind of machine, with one backend):

- a row has a key, the rank of its id: rows are drawn, ordered and told apart in ties by it, never by where they are;
- a row's label depends on the row and the centroids alone (:mod:`paris_ray.data.nearest`); where the triangle inequality shows that it is what it
  was, it is not looked for again;
- sums are exact, so they have no order, and may be updated by what came and what left;
- what decides (stop, re-seeding) is made of integers and of comparisons, never of a sum of distances.

``cosine`` means Euclidean k-means on rows scaled to unit length; centroids are plain means of them and are not scaled again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from paris_ray import rng
from paris_ray.data.nearest import BATCH, BLOCK, F32, GRID, Nearest, Stored, nearest_to, one_blas_thread, prepare

SAMPLE_PER_CENTROID = 128
"""Rows for k-means++, per centroid: it takes one pass for each centroid, so it sees a sample of a large corpus."""

CHANGED_SHARE = 100_000
"""Lloyd stops when at most one row in this many has changed its cluster: none at all below that many rows."""

Labels = NDArray[np.int32]
Keys = NDArray[np.integer]


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
    """Rows wherever they live. What they remember of an iteration they can find again, so any of them may be lost and loaded anew."""

    total: int

    def assign(self, centroids: F32, previous: F32 | None) -> Partial:
        """Put every row into the cluster of its nearest centroid (K, D), from that of its nearest among the previous ones."""
        ...

    def farthest(self, n: int, centroids: F32) -> F32:
        """The ``n`` rows farthest from their nearest centroids, (n, D); ties to the lower key, none at distance zero."""
        ...

    def take(self, keys: Keys) -> F32:
        """Rows by key."""
        ...

    def squares(self) -> int:
        """Sum of squares of all rows, in units of ``GRID**2``."""
        ...


class Rows:
    """Rows in memory: all of the corpus, or a part of it. As stored, so that a row takes its float16 and 16 bytes.

    Args:
        stored: (n, D) float16 or float32.
        scale: of each row (:func:`paris_ray.data.nearest.scales`).
        keys: of each row, among all rows wherever they are; by default the order given.
        weights: how often each row counts, integers; by default once.
        backend: ``numpy``, ``torch`` or ``faiss``.
        threads: blocks of rows worked on at once; the bits do not depend on it.
    """

    def __init__(
        self,
        stored: Stored,
        scale: F32,
        keys: Keys | None = None,
        weights: NDArray[np.int64] | None = None,
        backend: str = "numpy",
        threads: int = 1,
    ):
        self.stored, self.scale, self.weights, self.backend, self.threads = stored, scale, weights, backend, threads
        self.total = len(stored)
        self.keys = np.arange(self.total, dtype=np.int32) if keys is None else keys
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._labels, self._room = np.full(self.total, -1, np.int32), np.full(self.total, -np.inf, np.float32)
        self._found: F32 | None = None  # the centroids that the labels belong to

    def _each_block(self, function: Callable[[slice], Any]) -> list[Any]:
        blocks = [slice(low, min(low + BLOCK, self.total)) for low in range(0, self.total, BLOCK)]
        if self.threads == 1 or len(blocks) == 1:
            return [function(block) for block in blocks]
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(function, blocks))

    # -- an iteration ---------------------------------------------------------------------------------------------------

    def assign(self, centroids: F32, previous: F32 | None = None) -> Partial:
        if previous is None:
            self._forget()
        else:
            self._find(previous)
        changed = self._find(centroids)
        return Partial(self._sums * GRID, self._counts.copy(), changed)

    def labels(self, centroids: F32) -> Labels:
        """The nearest centroid of each row, (n,)."""
        self._find(centroids)
        return self._labels

    def _find(self, centroids: F32) -> int:
        """Bring labels, sums and counts to these centroids; returns how many rows have moved."""
        if self._found is not None and np.array_equal(self._found, centroids):
            return 0
        if self._found is None or self._found.shape != centroids.shape:
            self._forget()
            self._sums, self._counts = np.zeros(centroids.shape), np.zeros(len(centroids), np.int64)
        less = np.zeros(len(centroids), np.float32) if self._found is None else _less_room(self._found, centroids)
        with nearest_to(self.backend, centroids) as nearest:
            moved = self._each_block(lambda block: self._find_block(block, nearest, less))
        self._found = centroids
        return sum(moved)

    def _find_block(self, block: slice, nearest: Nearest, less: F32) -> int:
        old = self._labels[block]
        room = np.nextafter(self._room[block] - less[old], np.float32(-np.inf))
        open_ = np.flatnonzero(room <= 0)  # where another centroid may be nearer by now
        new = old.copy()
        if len(open_) == len(old):
            new, room = nearest(self.stored[block], self.scale[block])
        elif len(open_):
            new[open_], room[open_] = nearest(self.stored[block][open_], self.scale[block][open_])
        self._room[block] = room
        came = np.flatnonzero(new != old)
        left = came[old[came] >= 0]
        rows, sign = np.concatenate([came, left]) + block.start, np.repeat([1, -1], [len(came), len(left)])
        self._add(rows, np.concatenate([new[came], old[left]]), sign, self._sums, self._counts)
        self._labels[block] = new
        return len(came)

    def _add(self, rows: NDArray[np.int64], labels: Labels, sign: NDArray[np.int64], sums: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        """Add rows to the sums of clusters, or take them away."""
        order = np.argsort(labels, kind="stable")
        for low in range(0, len(order), BATCH):
            here = order[low : low + BATCH]
            at, into, times = rows[here], labels[here], sign[here]
            if self.weights is not None:
                times = times * self.weights[at]
            first = np.flatnonzero(np.diff(into, prepend=-1))
            which = sparse.csr_array((times.astype(np.float64), np.arange(len(here)), np.append(first, len(here))), (len(first), len(here)))
            summed = which @ prepare(self.stored[at], self.scale[at]).astype(np.float64)
            with self._lock:
                sums[into[first]] += summed
                counts[into[first]] += np.add.reduceat(times, first)

    # -- other questions ------------------------------------------------------------------------------------------------

    def sums_by(self, labels: Labels, k: int) -> Partial:
        """Sums and counts for labels (n,) from elsewhere."""
        sums, counts = np.zeros((k, self.stored.shape[1])), np.zeros(k, np.int64)
        ones = np.ones(BLOCK, np.int64)
        self._each_block(lambda b: self._add(np.arange(b.start, b.stop), labels[b], ones[: b.stop - b.start], sums, counts))
        return Partial(sums * GRID, counts, self.total)

    def distances(self, labels: Labels, centroids: F32) -> F32:
        """Squared distance of each row to the centroid that its label names, (n,)."""

        def block(b: slice) -> F32:
            return np.concatenate([((self._real(p) - centroids[labels[p]]) ** 2).sum(1) for p in _batches(b)])

        return np.concatenate([np.empty(0, np.float32), *self._each_block(block)])

    def farthest_keys(self, n: int, centroids: F32) -> tuple[F32, Keys]:
        """Distances and keys of the ``n`` farthest rows, farthest first."""
        distances = self.distances(self.labels(centroids), centroids)
        order = np.lexsort((self.keys, -distances))[:n]
        order = order[distances[order] > 0]
        return distances[order], self.keys[order]

    def farthest(self, n: int, centroids: F32) -> F32:
        return self.take(self.farthest_keys(n, centroids)[1])

    def take(self, keys: Keys) -> F32:
        return self.at(np.argsort(self.keys)[keys])

    def at(self, places: NDArray[np.int64]) -> F32:
        """Rows by where they are here."""
        return self._real(places)

    def _real(self, at: Any) -> F32:
        rows = prepare(self.stored[at], self.scale[at])
        return np.multiply(rows, np.float32(GRID), out=rows)

    def squares(self) -> int:
        def batch(b: slice) -> int:
            rows = prepare(self.stored[b], self.scale[b]).astype(np.float64)
            values = np.einsum("nd,nd->n", rows, rows).tolist()
            times = [1] * len(values) if self.weights is None else self.weights[b].tolist()
            return sum(int(value) * time for value, time in zip(values, times, strict=True))

        return sum(self._each_block(lambda block: sum(map(batch, _batches(block)))))


def _less_room(old: F32, new: F32) -> F32:
    """By how much a row's room may be less than it was, for each label: what its centroid and the fastest of the others have moved (Hamerly 2010)."""
    moved = np.sqrt(((new.astype(np.float64) - old) ** 2).sum(1))
    last = np.sort(moved)[-2:]
    others = np.where(moved == last[-1], last[0], last[-1]) if len(moved) > 1 else 0.0
    less: F32 = ((1 + 1e-5) * (moved + others)).astype(np.float32)  # above their rounding, and that of distances to longer centroids
    return less


def _batches(block: slice) -> list[slice]:
    return [slice(low, min(low + BATCH, block.stop)) for low in range(block.start, block.stop, BATCH)]


# -- start --------------------------------------------------------------------------------------------------------------


def plus_plus(sample: F32, k: int, seed: int, weights: NDArray[np.int64] | None = None, threads: int = 1) -> F32:
    """Greedy k-means++: each next centroid is the best of 2 + ⌊ln k⌋ rows drawn with probability ∝ weight × squared distance; (n, D) → (k, D)."""
    mass = np.ones(len(sample)) if weights is None else weights.astype(np.float64)
    x2 = np.einsum("nd,nd->n", sample, sample, dtype=np.float64)
    blocks = [slice(low, low + BLOCK) for low in range(0, len(sample), BLOCK)]

    def squared(indices: NDArray[np.int64]) -> NDArray[np.float64]:
        chosen = sample[indices].T
        d2 = x2[:, None] + x2[indices] - 2.0 * np.concatenate(list(each(lambda block: sample[block] @ chosen, blocks)))
        return np.where(d2 > 1e-6 * (x2[:, None] + x2[indices]), d2, 0.0)

    def drawn(of: NDArray[np.float64], values: Any) -> NDArray[np.int64]:
        ladder = np.cumsum(of)
        return np.minimum(np.searchsorted(ladder, values * ladder[-1], side="right"), len(sample) - 1)

    trials = 2 + int(math.log(k))
    with one_blas_thread(), ThreadPoolExecutor(threads) as pool:
        each: Any = map if len(blocks) == 1 else pool.map
        chosen = drawn(mass, rng.generator(seed, "kmeans++", 0).random(1)).tolist()
        nearest = squared(np.array(chosen))[:, 0]
        for j in range(1, k):
            tried = drawn(nearest * mass, rng.generator(seed, "kmeans++", j).random(trials))
            options = np.minimum(nearest[:, None], squared(tried))
            best = int((options * mass[:, None]).sum(0).argmin())
            chosen.append(int(tried[best]))
            nearest = options[:, best]
    return sample[chosen]


def sample_keys(total: int, k: int, seed: int) -> Keys:
    """Keys of the rows that k-means++ sees: all, or :data:`SAMPLE_PER_CENTROID` per centroid without replacement, ascending."""
    size = k * SAMPLE_PER_CENTROID
    if total <= size:
        return np.arange(total)
    return np.sort(rng.generator(seed, "kmeans-sample", 0).choice(total, size, replace=False))


# -- iterations ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """All that an iteration needs to know of those before it.

    Attributes:
        centroids: of the next iteration, (K, D) float32.
        previous: of the last one; None before the first.
        inertia: of all before it.
    """

    centroids: F32
    previous: F32 | None = None
    inertia: tuple[float, ...] = ()


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


def means(part: Partial) -> F32:
    """Mean of each cluster, (K, D); zero where there is no row."""
    mean: F32 = (part.sums / np.maximum(part.counts, 1)[:, None]).astype(np.float32)
    return mean


def inertia_of(squares: int, part: Partial, centroids: F32) -> float:
    """Σ|x − c|² = Σ|x|² + Σ_k (n_k·|c_k|² − 2·c_k·S_k), from exact sums."""
    wide = centroids.astype(np.float64)
    terms = part.counts * np.einsum("kd,kd->k", wide, wide) - 2 * np.einsum("kd,kd->k", wide, part.sums)
    return max(math.fsum([squares / int(GRID**-2), *terms]), 0.0)


OnIteration = Callable[[int, float, int], None]
"""Called with (iteration from 0, inertia, rows that moved)."""


def lloyd(
    rows: RowSet, state: State, max_iterations: int, on_iteration: OnIteration | None = None, save: Callable[[State], None] | None = None
) -> Fit:
    """Lloyd's algorithm from given centroids, or from where an earlier run was.

    Stops when at most one row in :data:`CHANGED_SHARE` changed its cluster and none is empty, or after ``max_iterations``. Empty clusters, in the
    order of their index, restart at the rows farthest from their centroids, farthest first.

    Args:
        rows: N rows, N ≥ K.
        state: ``State(start)`` for a start (K, D).
        max_iterations: limit.
        on_iteration: told of each.
        save: given the state after each iteration, from which another run goes on to the same bits.
    """
    squares = rows.squares()
    while True:
        centroids, iteration = state.centroids, len(state.inertia)
        part = rows.assign(centroids, state.previous)
        inertia = (*state.inertia, inertia_of(squares, part, centroids))
        if on_iteration is not None:
            on_iteration(iteration, inertia[-1], part.changed)
        empty = np.flatnonzero(part.counts == 0)
        seeds = rows.farthest(len(empty), centroids) if len(empty) else centroids[:0]
        done = part.changed <= rows.total // CHANGED_SHARE and len(seeds) == 0
        if done or iteration + 1 == max_iterations:
            return Fit(centroids, part.counts, list(inertia), done)
        new = np.where(part.counts[:, None] > 0, means(part), centroids)
        new[empty[: len(seeds)]] = seeds
        state = State(new, centroids, inertia)
        if save is not None:
            save(state)


def start(rows: RowSet, k: int, seed: int, threads: int = 1) -> State:
    """k-means++ on a bounded sample.

    Raises:
        ValueError: fewer rows than clusters.
    """
    if rows.total < k:
        raise ValueError(f"{rows.total} rows cannot make {k} clusters; give more rows or ask for at most {rows.total} clusters")
    return State(plus_plus(rows.take(sample_keys(rows.total, k, seed)), k, seed, threads=threads))


def kmeans(rows: RowSet, k: int, seed: int, max_iterations: int = 100) -> Fit:
    """:func:`start`, then :func:`lloyd` on all rows."""
    return lloyd(rows, start(rows, k, seed), max_iterations)
