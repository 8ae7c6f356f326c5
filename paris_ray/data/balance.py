"""Coarse clusters over fine ones: the second level of the hierarchy, with an optional cap on what one expert gets. NumPy only.

By default fine centroids count once each, whatever the size of their clusters, as in arXiv 2510.03434 and ssl-data-curation (arXiv 2405.15613): the
upper level clusters the support of the data, not its density, and sizes enter only through the cap. Weighted, each counts as often as it has rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_ray import rng
from paris_ray.config import ConfigError
from paris_ray.data.kmeans import Fit, Labels, Rows, State, lloyd, plus_plus
from paris_ray.data.nearest import F32, scales

RESTARTS = 100
"""Starts of the coarse k-means, of which the lowest inertia is kept: it has few rows, and from 32 starts it was up to 2 % above the best."""

MAX_ROUNDS = 100


@dataclass(frozen=True)
class Coarse:
    """The second level.

    Attributes:
        centroids: mean (weighted or not) of the fine centroids of each coarse cluster, (K, D) float32.
        fine_to_coarse: (F,) int64.
        inertia: sum of squared distances (weighted or not) of fine centroids to their coarse ones: k-means' iterations, then the balancing's.
        cap: rows that one coarse cluster may hold, or None.
        over: coarse clusters that hold more than the cap, because no packing within it was found.
    """

    centroids: F32
    fine_to_coarse: NDArray[np.int64]
    inertia: list[float]
    cap: float | None
    over: tuple[int, ...]


def coarse_clusters(
    fine: F32,
    sizes: NDArray[np.int64],
    k: int,
    seed: int,
    max_iterations: int,
    max_share: float | None,
    weighted: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> Coarse:
    """Cluster F fine centroids into K coarse clusters.

    Args:
        fine: fine centroids (F, D).
        sizes: rows of each fine cluster (F,).
        k: number of coarse clusters.
        seed: of the run.
        max_iterations: limit of k-means.
        max_share: cap on the rows of a coarse cluster, as a multiple of an equal share; None is no cap.
        weighted: whether a fine centroid counts as often as it has rows, or once.
        say: told what is going on.

    Raises:
        ConfigError: one fine cluster alone is larger than the cap.
    """
    total = int(sizes.sum())
    cap = None if max_share is None else max_share * total / k
    if cap is not None and sizes.max() > cap:
        largest, worst = int(sizes.max()), int(sizes.argmax())
        raise ConfigError(
            f"partition.max_share: {max_share} allows an expert {cap:.0f} of {total} rows, but fine cluster {worst} alone has {largest} and is not "
            f"divided; raise partition.fine (now {len(sizes)}), set partition.max_share to null or to at least "
            f"{math.ceil(largest * k / total * 100) / 100:.2f}"
        )
    # Around their middle and up to 1: embeddings may differ by far less than their length, and rows are on a grid of fixed spacing.
    middle = fine.astype(np.float64).mean(0)
    points = fine.astype(np.float64) - middle
    unit = 2.0 ** math.ceil(math.log2(np.abs(points).max() or 1.0))
    points /= unit
    mass = sizes if weighted else np.ones(len(fine), np.int64)
    stored = points.astype(np.float32)
    best: tuple[float, Fit, Labels] | None = None
    for restart in range(RESTARTS):
        say(f"coarse clusters: start {restart + 1} of {RESTARTS}")
        rows = Rows(stored, scales(stored, "euclidean", int(mass.sum())), weights=mass)
        fit = lloyd(rows, State(plus_plus(stored, k, rng.key(seed, "coarse", restart), mass)), max_iterations)
        if best is None or fit.inertia[-1] < best[0]:
            best = (fit.inertia[-1], fit, rows.labels(fit.centroids))
    assert best is not None
    _, fit, found = best
    labels, inertia = found.astype(np.int64), list(fit.inertia)
    over: tuple[int, ...] = ()
    if cap is not None and np.bincount(labels, sizes, k).max() > cap:
        labels, balanced, over = balance(points, sizes, fit.centroids.astype(np.float64), cap, mass, say)
        inertia += balanced
    centroids = _means(points, labels, fit.centroids.astype(np.float64), mass) * unit + middle
    return Coarse(centroids.astype(np.float32), labels, [value * unit**2 for value in inertia], cap, over)


def balance(
    points: NDArray[np.float64],
    weights: NDArray[np.int64],
    centroids: NDArray[np.float64],
    cap: float,
    mass: NDArray[np.int64] | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> tuple[NDArray[np.int64], list[float], tuple[int, ...]]:
    """Assign points to centroids at the least squared distance, times their mass, so that the weights of each cluster stay within ``cap``.

    A first assignment by regret (or, where that fails, heaviest point into the lightest cluster), then in turn: moves and exchanges that lower the
    cost within the cap, and new centroids. The cost never rises, so it ends. A heuristic: least cost under a cap is NP-hard.

    Returns:
        labels (F,), cost of each round, and the clusters still above the cap.
    """
    k = len(centroids)
    mass = np.ones(len(points), np.int64) if mass is None else mass
    labels = _by_regret(_costs(points, centroids, mass), weights, cap)
    if labels is None:
        labels = _heaviest_first(_costs(points, centroids, mass), weights, cap)
    history: list[float] = []
    for _ in range(MAX_ROUNDS):
        centroids = _means(points, labels, centroids, mass)
        improved = _improve(_costs(points, centroids, mass), weights, cap, labels, say)
        history.append(float(_costs(points, centroids, mass)[np.arange(len(points)), improved].sum()))
        if (improved == labels).all():
            break
        labels = improved
    loads = np.bincount(labels, weights, k)
    return labels, history, tuple(int(i) for i in np.flatnonzero(loads > cap))


def _costs(points: NDArray[np.float64], centroids: NDArray[np.float64], mass: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.stack([mass * ((points - c) ** 2).sum(1) for c in centroids], axis=1)  # (F, K)


def _means(points: NDArray[np.float64], labels: NDArray[np.int64], old: NDArray[np.float64], mass: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.stack([np.average(points[labels == k], 0, mass[labels == k]) if mass[labels == k].any() else old[k] for k in range(len(old))])


def _by_regret(cost: NDArray[np.float64], weights: NDArray[np.int64], cap: float) -> NDArray[np.int64] | None:
    """Next is always the point that would lose most by its second choice; None when a point finds no room."""
    labels, loads = np.full(len(cost), -1), np.zeros(cost.shape[1])
    for _ in range(len(cost)):
        open_ = np.where(loads[None] + weights[:, None] <= cap, cost, np.inf)
        first = open_.min(1)
        waiting = labels < 0
        if np.isinf(first[waiting]).any():
            return None
        second = np.partition(open_, 1, axis=1)[:, 1]
        point = int(np.where(waiting, second - np.where(np.isinf(first), 0.0, first), -np.inf).argmax())
        labels[point] = int(open_[point].argmin())
        loads[labels[point]] += weights[point]
    return labels


def _heaviest_first(cost: NDArray[np.float64], weights: NDArray[np.int64], cap: float) -> NDArray[np.int64]:
    """Heaviest point first, into the lightest cluster: within the cap whenever weights.max() ≤ (cap − mean)·K/(K−1) (Graham 1969)."""
    labels, loads = np.full(len(cost), -1), np.zeros(cost.shape[1])
    for point in np.argsort(-weights, kind="stable"):
        labels[point] = int(loads.argmin())
        loads[labels[point]] += weights[point]
    return labels


@dataclass(frozen=True, order=True)
class _Change:
    """A move of one point into another cluster, or an exchange of two. Of equal gains moves come first, then the lower points.

    Attributes:
        gain: by how much it lowers what is lowered, negative.
        swaps: whether it is an exchange.
        point: that moves.
        other: the cluster it moves to, or the point that takes its place.
    """

    gain: float = 0.0
    swaps: bool = False
    point: int = -1
    other: int = -1


def _improve(
    cost: NDArray[np.float64], weights: NDArray[np.int64], cap: float, labels: NDArray[np.int64], say: Callable[[str], None]
) -> NDArray[np.int64]:
    """The best move or exchange, again and again until none lowers first the rows above the cap, then the cost.

    The best of each pair of clusters is kept; after a change only the pairs of its two clusters are looked at again.
    """
    labels, k = labels.copy(), cost.shape[1]
    loads: NDArray[Any] = np.bincount(labels, weights, k)
    smallest = 1e-9 * float(cost.mean())  # below it a gain is rounding, and could be undone for ever
    best = {pair: _Change() for pair in itertools.combinations(range(k), 2)}
    members = [np.flatnonzero(labels == a) for a in range(k)]
    touched, done = set(range(k)), 0
    whole, row_above = math.floor(cap), float(cost.sum()) + 1.0  # one row above the cap outweighs any gain in cost

    def excess(load: Any) -> Any:
        return row_above * np.maximum(load - whole, 0.0)

    while best:
        for a, b in best:
            if a in touched or b in touched:
                best[a, b] = _best_change(cost, weights, excess, loads, members, a, b)
        change = min(best.values())
        if change.gain >= -smallest:
            break
        i, source = change.point, int(labels[change.point])
        target = int(labels[change.other]) if change.swaps else change.other
        labels[i] = target
        if change.swaps:
            labels[change.other] = source
        touched = {source, target}
        for a in touched:
            members[a] = np.flatnonzero(labels == a)
            loads[a] = weights[members[a]].sum()
        done += 1
        say(f"balancing: {done} fine clusters moved or exchanged")
    return labels


def _best_change(
    cost: NDArray[np.float64],
    weights: NDArray[np.int64],
    excess: Callable[[Any], Any],
    loads: NDArray[Any],
    members: list[NDArray[np.int64]],
    a: int,
    b: int,
) -> _Change:
    """The best change between two clusters."""
    now = excess(loads[a]) + excess(loads[b])
    found = [_Change()]
    for source, target in ((a, b), (b, a)):
        if len(points := members[source]) > 1:  # no cluster is emptied
            after = excess(loads[source] - weights[points]) + excess(loads[target] + weights[points])
            gain = cost[points, target] - cost[points, source] + (after - now)
            found.append(_Change(float(gain.min()), False, int(points[gain.argmin()]), target))
    ones, others = members[a], members[b]
    if not len(ones) or not len(others):
        return min(found)
    leaves, comes = cost[ones, b] - cost[ones, a], cost[others, a] - cost[others, b]
    if now == 0:  # then an exchange must gain in cost: only those points that gain with the best of the other cluster can
        leaving, coming = leaves + comes.min() < 0, comes + leaves.min() < 0
        ones, leaves, others, comes = ones[leaving], leaves[leaving], others[coming], comes[coming]
    if len(ones) and len(others):
        heavier = weights[others] - weights[ones][:, None]
        gain = leaves[:, None] + comes + (excess(loads[a] + heavier) + excess(loads[b] - heavier) - now)
        i, j = np.unravel_index(gain.argmin(), gain.shape)
        found.append(_Change(float(gain[i, j]), True, int(ones[i]), int(others[j])))
    return min(found)
