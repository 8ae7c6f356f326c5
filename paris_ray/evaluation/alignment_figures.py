"""What the losses of experts on rows of all clusters say (:mod:`paris_ray.evaluation.alignment` measures them). NumPy and SciPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from paris_ray.evaluation.intervals import Interval, mean_interval, sets_interval

ASKED = 2
"""Experts that a router asks: the paper's top-2."""


@dataclass(frozen=True)
class Part:
    """Of one training.

    Attributes:
        losses: (K experts, N) mean over times.
        asked: (T, N) mean loss of the experts asked.
        others: (T, N) mean loss of those not asked.
        rank: (N,) how near the clusters of those asked are to the clean row, as the mean rank, 0 the nearest; empty without centroids.
        share: (T, K) mean probability that the router gives.
    """

    losses: NDArray[np.float64]
    asked: NDArray[np.float64]
    others: NDArray[np.float64]
    rank: NDArray[np.float64]
    share: NDArray[np.float64]


@dataclass(frozen=True)
class Own:
    """Of a cluster's own expert, beside the best of the others on the rows of that cluster.

    Attributes:
        cluster: which.
        rows: of it that were measured.
        rival: the expert with the least mean loss of the others.
        lead: its loss minus the own expert's: above zero the own one is better.
        best: in how many trainings the own expert has the least loss of all.
    """

    cluster: int
    rows: int
    rival: int
    lead: Interval
    best: int


@dataclass(frozen=True)
class Alignment:
    """Of all trainings of a row.

    Attributes:
        matrix: mean losses (K, K).
        own: of each cluster that has rows.
        advantage: loss of those not asked minus loss of those asked; ``None`` where all are asked.
        advantage_at: (T,) the same at each time, without interval.
        nearness: mean rank by chance minus the mean rank of those asked; above zero they are nearer. ``None`` without centroids.
        share: (T, K).
    """

    matrix: NDArray[np.float64]
    own: list[Own]
    advantage: Interval | None
    advantage_at: NDArray[np.float64]
    nearness: Interval | None
    share: NDArray[np.float64]


def measure(experts: NDArray[np.float64], router: NDArray[np.float64], ranks: NDArray[np.int64] | None) -> Part:
    """One training's part.

    Args:
        experts: losses (K, T, N).
        router: probabilities (T, N, K).
        ranks: (N, K) nearness of each cluster to each row.
    """
    asked, others = asked_and_not(experts, router)
    rank = np.empty(0)
    if ranks is not None:
        chosen = np.argsort(-router, axis=2, kind="stable")[..., :ASKED]  # (T, N, 2)
        rank = np.stack([np.take_along_axis(ranks, one, 1).mean(1) for one in chosen]).mean(0)
    return Part(experts.mean(1), asked, others, rank, router.mean(1))


def together(parts: Sequence[Part], clusters: NDArray[np.int64]) -> Alignment:
    """Of several trainings on the same rows; intervals over rows and trainings.

    Args:
        parts: of the trainings.
        clusters: (N,) of the rows.
    """
    matrix = np.mean([own_cluster(part.losses[:, None], clusters) for part in parts], 0)
    k = len(matrix)
    nearness = None
    if all(len(part.rank) for part in parts):
        nearness = mean_interval(np.stack([(k - 1) / 2 - part.rank for part in parts], 1))
    gain = np.stack([part.others - part.asked for part in parts], 2)  # (T, N, R)
    advantage = None if np.isnan(gain).any() else mean_interval(gain.mean(0))
    shares = np.mean([part.share for part in parts], 0)
    losses = np.stack([part.losses for part in parts], 2)
    return Alignment(matrix, own_experts(losses, clusters), advantage, gain.mean((1, 2)), nearness, shares)


def own_cluster(losses: NDArray[np.float64], clusters: NDArray[np.int64]) -> NDArray[np.float64]:
    """The matrix of mean losses: (K experts, K clusters), NaN where a cluster has no row.

    Args:
        losses: (K, T, N).
        clusters: (N,).
    """
    by_row = losses.mean(1)  # (K, N)
    columns = [by_row[:, clusters == c].mean(1) if (clusters == c).any() else np.full(len(by_row), np.nan) for c in range(len(by_row))]
    return np.stack(columns, 1)


def own_experts(losses: NDArray[np.float64], clusters: NDArray[np.int64]) -> list[Own]:
    """How far each cluster's own expert is ahead of the best of the others, which is chosen by the same rows, so that this is not flattering.

    Args:
        losses: (K experts, N, R trainings).
        clusters: (N,).
    """
    found = []
    for cluster in range(len(losses)):
        here = losses[:, clusters == cluster]  # (K, n, R)
        if not here.shape[1] or len(losses) < 2:
            continue
        others = [k for k in range(len(losses)) if k != cluster]
        rival = min(others, key=lambda k, here=here: float(here[k].mean()))  # type: ignore[misc]
        best = int((here.mean(1).argmin(0) == cluster).sum())
        found.append(Own(cluster, here.shape[1], rival, mean_interval(here[rival] - here[cluster]), best))
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


def disagreement_in_pictures(disagreement: NDArray[np.float64], quality: NDArray[np.float64], things: NDArray[np.int64], seed: int) -> Interval:
    """Rank correlation of how much experts disagree about a row with how good the picture of its caption and noise is.

    Not of its loss: that of a mixture is the experts' mean loss minus their disagreement, whatever they have learnt.

    Args:
        disagreement: (N rows, R trainings).
        quality: (N, R), higher is better.
        things: (N,) how many things a row has: of more there is more to disagree about, and more to go wrong.
        seed: of bootstrap draws.
    """
    strata = np.repeat(things[:, None].astype(np.float64), disagreement.shape[1], 1)
    return sets_interval(rank_correlation, disagreement, quality, strata, seed=seed)


def rank_correlation(a: NDArray[np.floating], b: NDArray[np.floating], strata: NDArray[np.floating]) -> float:
    """Spearman's of two (N,), within each stratum (N,); the mean over strata by their rows."""
    total = rows = 0.0
    for stratum in np.unique(strata):
        own = strata == stratum
        if (n := int(own.sum())) > 2:
            x, y = (rankdata(one[own]) for one in (a, b))
            x, y = x - x.mean(), y - y.mean()
            length = float(np.sqrt(np.square(x).sum() * np.square(y).sum()))
            total, rows = total + n * float(x @ y) / (length or 1.0), rows + n
    return total / rows if rows else 0.0
