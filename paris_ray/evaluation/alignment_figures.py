"""What the losses of experts on rows of all clusters say (:mod:`paris_ray.evaluation.alignment` measures them). NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paris_ray.evaluation.intervals import Interval, bootstrap

ASKED = 2
"""Experts that a router asks: the paper's top-2."""


@dataclass(frozen=True)
class Part:
    """Of one training.

    Attributes:
        matrix: mean losses (K experts, K clusters), NaN where a cluster has no row.
        asked: (N,) mean loss of the experts asked.
        others: (N,) mean loss of those not asked.
        rank: (N,) how near the clusters of those asked are to the row, as the mean rank, 0 the nearest; empty without centroids.
        share: (T, K) mean probability that the router gives.
        correlation: rank correlation over rows of the experts' disagreement with the mixture's loss, the mean over times.
    """

    matrix: NDArray[np.float64]
    asked: NDArray[np.float64]
    others: NDArray[np.float64]
    rank: NDArray[np.float64]
    share: NDArray[np.float64]
    correlation: float


@dataclass(frozen=True)
class Alignment:
    """Of all trainings of a row.

    Attributes:
        matrix: mean losses (K, K).
        failing: clusters whose own expert is not the best: (cluster, who is, by which share of the own one's loss).
        known: clusters that have rows.
        advantage: loss of those not asked minus loss of those asked; ``None`` where all are asked.
        nearness: mean rank by chance minus the mean rank of those asked; above zero they are nearer. ``None`` without centroids.
        correlations: of each training.
        share: (T, K).
    """

    matrix: NDArray[np.float64]
    failing: list[tuple[int, int, float]]
    known: int
    advantage: Interval | None
    nearness: Interval | None
    correlations: list[float]
    share: NDArray[np.float64]


def measure(
    experts: NDArray[np.float64],
    router: NDArray[np.float64],
    disagreement: NDArray[np.float64],
    clusters: NDArray[np.int64],
    routed: NDArray[np.float64],
    ranks: NDArray[np.int64] | None,
) -> Part:
    """One training's part.

    Args:
        experts: losses (K, T, N).
        router: probabilities (T, N, K).
        disagreement: (T, N).
        clusters: (N,).
        routed: the mixture's losses (T, N).
        ranks: (N, K) nearness of each cluster to each row.
    """
    asked, others = asked_and_not(experts, router)
    rank = np.empty(0)
    if ranks is not None:
        chosen = np.argsort(-router, axis=2, kind="stable")[..., :ASKED]  # (T, N, 2)
        rank = np.stack([np.take_along_axis(ranks, one, 1).mean(1) for one in chosen]).mean(0)
    correlation = float(np.mean([rank_correlation(a, b) for a, b in zip(disagreement, routed, strict=True)]))
    return Part(own_cluster(experts, clusters), asked.mean(0), others.mean(0), rank, router.mean(1), correlation)


def together(parts: Sequence[Part], seed: int) -> Alignment:
    """Of several trainings; intervals over rows and trainings."""
    matrix = np.mean([part.matrix for part in parts], 0)
    k = len(matrix)
    nearness = None
    if all(len(part.rank) for part in parts):
        nearness = bootstrap(np.stack([(k - 1) / 2 - part.rank for part in parts], 1), seed)
    gain = np.stack([part.others - part.asked for part in parts], 1)
    advantage = None if np.isnan(gain).any() else bootstrap(gain, seed)
    known = int((~np.isnan(matrix).any(0)).sum())
    return Alignment(matrix, failing(matrix), known, advantage, nearness, [part.correlation for part in parts], np.mean([p.share for p in parts], 0))


def own_cluster(losses: NDArray[np.float64], clusters: NDArray[np.int64]) -> NDArray[np.float64]:
    """The matrix of mean losses: (K experts, K clusters), NaN where a cluster has no row.

    Args:
        losses: (K, T, N).
        clusters: (N,).
    """
    by_row = losses.mean(1)  # (K, N)
    columns = [by_row[:, clusters == c].mean(1) if (clusters == c).any() else np.full(len(by_row), np.nan) for c in range(len(by_row))]
    return np.stack(columns, 1)


def failing(matrix: NDArray[np.float64]) -> list[tuple[int, int, float]]:
    """Clusters whose own expert is not the best: (cluster, who is, by which share of the own one's loss)."""
    found = []
    for cluster, column in enumerate(matrix.T):
        if not np.isnan(column).any() and (best := int(column.argmin())) != cluster:
            found.append((cluster, best, float(1 - column[best] / column[cluster])))
    return found


def asked_and_not(losses: NDArray[np.float64], router: NDArray[np.float64], k: int = ASKED) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean loss of the k experts that the router would ask, and of the others: two of (T, N), the second NaN where there are no others.

    Args:
        losses: (K, T, N).
        router: (T, N, K).
        k: how many are asked.
    """
    order = np.argsort(-router, axis=2, kind="stable")
    sorted_losses = np.take_along_axis(losses.transpose(1, 2, 0), order, 2)  # (T, N, K)
    others = sorted_losses[..., k:]
    return sorted_losses[..., :k].mean(2), others.mean(2) if others.shape[2] else np.full(others.shape[:2], np.nan)


def rank_correlation(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Spearman's, of two rows of numbers without ties."""
    x, y = (np.argsort(np.argsort(one)).astype(np.float64) for one in (a, b))
    return float(((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std()))
