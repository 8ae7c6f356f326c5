"""How sure a number is: bootstrap intervals over captions, over seeds that all captions share, and of differences between models. NumPy only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from paris_ray import rng

LEVEL = 0.95
REPEATS = 2000


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.4g} (95 %: {self.low:.4g} … {self.high:.4g})"


def bootstrap(values: NDArray[np.floating], seed: int, repeats: int = REPEATS) -> Interval:
    """The mean of something measured of each picture, with its percentile interval.

    Captions are drawn anew with replacement and, of several seeds, these as well, each draw the same for all captions (Owen, Annals of Applied
    Statistics 1, 2007: a little wide where both count). Of one seed the interval says nothing of what another would have given.

    Args:
        values: (N,) of N captions, or (N, R) of the same captions under R seeds, of training or of pictures.
        seed: of the draws.
        repeats: how often.

    Raises:
        ValueError: there is nothing to draw from.
    """
    table = np.asarray(values, np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or not table.size:
        raise ValueError(f"values have the shape {np.shape(values)}; give (N,) or (N, R), with at least one")
    n, r = table.shape
    g = rng.generator(seed, "bootstrap", 0)
    means = np.empty(repeats)
    for i in range(repeats):
        rows = np.bincount(g.integers(n, size=n), minlength=n) / n
        columns = np.bincount(g.integers(r, size=r), minlength=r) / r
        means[i] = rows @ table @ columns
    return Interval(float(table.mean()), *_ends(means))


def bootstrap_paired(a: NDArray[np.floating], b: NDArray[np.floating], seed: int, repeats: int = REPEATS) -> Interval:
    """The mean of a − b, two models on the same captions under the same seeds; arguments as of :func:`bootstrap`. Of one sign: one is better."""
    if np.shape(a) != np.shape(b):
        raise ValueError(f"a has the shape {np.shape(a)}, b {np.shape(b)}; they must be of the same captions and seeds")
    return bootstrap(np.asarray(a, np.float64) - np.asarray(b, np.float64), seed, repeats)


def bootstrap_sets(
    statistic: Callable[..., float], *sets: NDArray[np.floating], seed: int, groups: NDArray[np.int64] | None = None, repeats: int = 200
) -> Interval:
    """A statistic of whole sets of pictures, such as a Fréchet distance, or the difference of two models' distances.

    Rows that are drawn twice make such a distance larger, so the replicates' spread is laid around the value of the sets themselves.

    Args:
        statistic: of the sets.
        sets: each (N, …); row i of each belongs to the same caption and seed. A reference that is not to be drawn anew is the statistic's own.
        seed: of the draws.
        groups: (N,) rows that are drawn together, such as those of one caption; ``None``: each is alone.
        repeats: how often.

    Raises:
        ValueError: the sets are not equally large.
    """
    n = len(sets[0])
    if any(len(one) != n for one in sets) or (groups is not None and len(groups) != n):
        raise ValueError(f"sets have {[len(one) for one in sets]} rows; row i of each must belong to the same caption")
    _, own = np.unique(np.arange(n) if groups is None else groups, return_inverse=True)
    members = np.split(np.argsort(own, kind="stable"), np.cumsum(np.bincount(own))[:-1])
    g = rng.generator(seed, "bootstrap-sets", 0)
    found = np.empty(repeats)
    for i in range(repeats):
        rows = np.concatenate([members[k] for k in g.integers(len(members), size=len(members))])
        found[i] = statistic(*(one[rows] for one in sets))
    value = float(statistic(*sets))
    low, high = _ends(found - found.mean())
    return Interval(value, value + low, value + high)


def split_floor(
    statistic: Callable[[NDArray[np.floating], NDArray[np.floating]], float],
    reference: NDArray[np.floating],
    seed: int,
    rows: int | None = None,
    repeats: int = 10,
) -> Interval:
    """The noise floor of a distance: what a perfect model would get, rows of the reference against the rest of it.

    Args:
        statistic: (reference, made) → distance.
        reference: (N, D).
        seed: of the draws.
        rows: how many stand for the made ones, as many as there are of these; ``None``, or more than half: half.
        repeats: how often they are drawn.

    Returns:
        mean over the draws, the least and the most.

    Raises:
        ValueError: the reference has fewer than four rows.
    """
    n = len(reference)
    if n < 4:
        raise ValueError(f"reference has {n} rows; a floor needs at least 4")
    taken = min(rows or n, n // 2)
    found = []
    for i in range(repeats):
        order = rng.permutation(seed, "split-floor", i, n)
        found.append(float(statistic(reference[order[taken:]], reference[order[:taken]])))
    return Interval(float(np.mean(found)), min(found), max(found))


def _ends(replicates: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
