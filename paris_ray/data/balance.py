"""Coarse clusters over fine ones: the second level of the hierarchy, with an optional cap on what one expert gets. NumPy only.

By default fine centroids count once each, whatever the size of their clusters, as in arXiv 2510.03434 and ssl-data-curation (arXiv 2405.15613): the
upper level clusters the support of the data, not its density, and sizes enter only through the cap. Weighted, each counts as often as it has rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_ray import rng
from paris_ray.config import ConfigError
from paris_ray.data.kmeans import Fit, Labels, Rows, State, lloyd, plus_plus
from paris_ray.data.nearest import F32, scales

RESTARTS = 32
"""Starts of the coarse k-means, of which the lowest inertia is kept; it has few rows and costs nothing."""

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
    fine: F32, sizes: NDArray[np.int64], k: int, seed: int, max_iterations: int, max_share: float | None, weighted: bool = False
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
        rows = Rows(stored, scales(stored, "euclidean", int(mass.sum())), weights=mass)
        fit = lloyd(rows, State(plus_plus(stored, k, rng.key(seed, "coarse", restart), mass)), max_iterations)
        if best is None or fit.inertia[-1] < best[0]:
            best = (fit.inertia[-1], fit, rows.labels(fit.centroids))
    assert best is not None
    _, fit, found = best
    labels, inertia = found.astype(np.int64), list(fit.inertia)
    over: tuple[int, ...] = ()
    if cap is not None and np.bincount(labels, sizes, k).max() > cap:
        labels, balanced, over = balance(points, sizes, fit.centroids.astype(np.float64), cap, mass)
        inertia += balanced
    centroids = _means(points, labels, fit.centroids.astype(np.float64), mass) * unit + middle
    return Coarse(centroids.astype(np.float32), labels, [value * unit**2 for value in inertia], cap, over)


def balance(
    points: NDArray[np.float64], weights: NDArray[np.int64], centroids: NDArray[np.float64], cap: float, mass: NDArray[np.int64] | None = None
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
        improved = _improve(_costs(points, centroids, mass), weights, cap, labels)
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


def _improve(cost: NDArray[np.float64], weights: NDArray[np.int64], cap: float, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The best move or exchange, again and again until none lowers first the rows above the cap, then the cost."""
    labels = labels.copy()
    points = np.arange(len(labels))
    loads: NDArray[Any] = np.bincount(labels, weights, cost.shape[1])
    whole = np.floor(cap)
    row_above = float(cost.sum()) + 1.0  # one row above the cap outweighs any gain in cost
    smallest = 1e-9 * float(cost.mean())  # below it a gain is rounding, and could be undone for ever

    def excess(load: NDArray[Any]) -> NDArray[np.float64]:
        return row_above * np.maximum(load - whole, 0.0)

    while True:
        own = cost[points, labels]
        home = loads[labels][:, None]
        leaving = excess(home - weights[:, None]) - excess(home)
        arriving = excess(loads[None] + weights[:, None]) - excess(loads)[None]
        # Not to where it is, and no cluster is emptied.
        barred = (labels[:, None] == np.arange(cost.shape[1])) | (np.bincount(labels, minlength=cost.shape[1])[labels] == 1)[:, None]
        moves = np.where(barred, 0.0, cost - own[:, None] + leaving + arriving)
        half = cost[:, labels] - own[:, None] + excess(home - weights[:, None] + weights[None]) - excess(home)  # for i's cluster with j in i's place
        swaps = np.where(labels[:, None] == labels[None], 0.0, half + half.T)
        if min(moves.min(), swaps.min()) >= -smallest:
            return labels
        if moves.min() <= swaps.min():
            i, k = np.unravel_index(moves.argmin(), moves.shape)
            loads[labels[i]] -= weights[i]
            loads[k] += weights[i]
            labels[i] = k
        else:
            i, j = np.unravel_index(swaps.argmin(), swaps.shape)
            difference = weights[j] - weights[i]
            loads[labels[i]] += difference
            loads[labels[j]] -= difference
            labels[i], labels[j] = labels[j], labels[i]
