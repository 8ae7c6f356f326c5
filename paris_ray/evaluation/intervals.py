"""How sure a number is: 95 % intervals over captions and over trainings, of means, differences and distances. NumPy and SciPy only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from paris_ray import rng

LEVEL = 0.95
REPEATS = 200
"""Bootstrap draws of which only the variance is taken."""


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval.

    Attributes:
        value: the number.
        low: lower end.
        high: upper end.
        seeds: trainings that it is of; of one alone the interval says nothing of what another would have given.
        agree: how many of them have the number's sign.
    """

    value: float
    low: float
    high: float
    seeds: int = 1
    agree: int = 1

    def as_json(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.4g} (95 %: {self.low:.4g} … {self.high:.4g})"


@dataclass(frozen=True)
class Floor:
    """What a distance is by chance alone; the ends are those of the draws, which are no interval.

    Attributes:
        value: mean over the draws.
        least: of them.
        most: of them.
        rows: how many of the reference stood for pictures.
        others: how many they were measured to.
        draws: how many.
    """

    value: float
    least: float
    most: float
    rows: int
    others: int
    draws: int

    def __str__(self) -> str:
        return f"{self.value:.4g} (least and most of {self.draws} draws: {self.least:.4g} and {self.most:.4g})"


def signed(interval: Interval | None) -> str:
    """``+0.031 (+0.010 … +0.052)``, or a dash."""
    return "–" if interval is None else f"{interval.value:+.3g} ({interval.low:+.3g} … {interval.high:+.3g})"


def mean_interval(values: NDArray[np.floating], groups: NDArray[np.integer] | None = None) -> Interval:
    """The mean of something measured of each picture.

    Captions and trainings are both samples: the variance of the mean over captions and that of the mean over seeds are each taken with Student's t
    for as many as there are, and the two half-widths added as squares. What differs with both is in both terms: where it counts, this is wide.

    Args:
        values: (N,) of N captions, or (N, R) of the same captions under R seeds of training.
        groups: (N,) captions that ask the same thing count as one; ``None``: each is alone.

    Raises:
        ValueError: there is nothing to measure.
    """
    table = np.asarray(values, np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or not table.size:
        raise ValueError(f"values have the shape {np.shape(values)}; give (N,) or (N, R), with at least one")
    mean, n = float(table.mean()), len(table)
    off = table.mean(1) - mean
    if groups is not None:
        off = np.bincount(np.unique(groups, return_inverse=True)[1], off)
    g = len(off)
    of_captions = float(np.square(off).sum()) / n**2 * g / (g - 1) if g > 1 else np.inf
    return _interval(table.mean(0), of_captions, g)


def paired_interval(a: NDArray[np.floating], b: NDArray[np.floating], groups: NDArray[np.integer] | None = None) -> Interval:
    """The mean of a − b, two models on the same captions under the same seeds; as :func:`mean_interval`. Of one sign: one is better."""
    if np.shape(a) != np.shape(b):
        raise ValueError(f"a has the shape {np.shape(a)}, b {np.shape(b)}; they must be of the same captions and seeds")
    return mean_interval(np.asarray(a, np.float64) - np.asarray(b, np.float64), groups)


def sets_interval(statistic: Callable[..., float], *sets: NDArray[np.floating], seed: int, repeats: int = REPEATS) -> Interval:
    """A statistic of whole sets, such as a distance or the difference of two models' distances; as :func:`mean_interval`.

    The captions' variance is a bootstrap's, and no surer than it has draws. Rows that are drawn twice make a distance larger, so only the spread of
    the draws counts.

    Args:
        statistic: of the sets under one seed.
        sets: each (N, R, …); row i of each belongs to the same caption, column r to the same seed.
        seed: of the draws.
        repeats: how often.

    Raises:
        ValueError: the sets are not of the same captions and seeds.
    """
    n, r = sets[0].shape[:2]
    if any(one.shape[:2] != (n, r) for one in sets):
        raise ValueError(f"sets have {[one.shape[:2] for one in sets]} captions and seeds; they must have the same")
    each = lambda chosen: np.array([statistic(*(one[:, i] for one in chosen)) for i in range(r)])  # noqa: E731
    g = rng.generator(seed, "bootstrap-sets", 0)
    draws = [each([one[rows] for one in sets]).mean() for rows in (g.integers(n, size=n) for _ in range(repeats))]
    return _interval(each(sets), float(np.var(draws, ddof=1)), min(n, repeats))


def _interval(of_seeds: NDArray[np.float64], of_captions: float, count: int) -> Interval:
    """Of a mean over seeds.

    Args:
        of_seeds: (R,) the number under each.
        of_captions: variance of the mean as captions are drawn anew.
        count: of captions, or fewer draws, from which that variance is known.
    """
    value, r, upper = float(of_seeds.mean()), len(of_seeds), (1 + LEVEL) / 2
    square = float(student.ppf(upper, count - 1)) ** 2 * of_captions if count > 1 else np.inf
    if r > 1:
        square += float(student.ppf(upper, r - 1)) ** 2 * float(of_seeds.var(ddof=1)) / r
    half = float(np.sqrt(square))
    return Interval(value, value - half, value + half, r, int((np.sign(of_seeds) == np.sign(value)).sum()))


def split_floor(
    statistic: Callable[[NDArray[np.floating], NDArray[np.floating]], float],
    reference: NDArray[np.floating],
    seed: int,
    rows: int | None = None,
    repeats: int = 10,
) -> Floor:
    """The noise floor of a distance: what a perfect model would get, rows of the reference against the rest of it.

    Args:
        statistic: (reference, made) → distance.
        reference: (N, D).
        seed: of the draws.
        rows: how many stand for the made ones, as many as there are of these; ``None``, or more than half: half.
        repeats: how often they are drawn.

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
    return Floor(float(np.mean(found)), min(found), max(found), taken, n - taken, repeats)
