"""How far made pictures are from real ones, and from each other, in the space of an encoder. NumPy only; which encoder, the caller says.

A Fréchet distance is called FID only in the features of Inception as torch-fidelity has them (:mod:`paris_ray.evaluation.judges`). In any other space
it is named after its encoder, which must not be the one that made the clusters.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from paris_ray.evaluation.metrics import unit

_BLOCK = 1024
"""Rows compared with all others at once."""


def moments(features: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), in float64.

    Raises:
        ValueError: fewer than two rows.
    """
    wide = np.asarray(features, np.float64)
    if wide.ndim != 2 or len(wide) < 2:
        raise ValueError(f"features have the shape {wide.shape}; a covariance needs (N, D) with at least 2 rows")
    return wide.mean(0), np.atleast_2d(np.cov(wide, rowvar=False))


def frechet(mean_a: NDArray[np.float64], covariance_a: NDArray[np.float64], mean_b: NDArray[np.float64], covariance_b: NDArray[np.float64]) -> float:
    """Fréchet distance of two Gaussians, squared (Dowson & Landau 1982): |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2·(Σ_a Σ_b)^½). Σ may be singular."""
    return _frechet(mean_a, covariance_a, _root(covariance_a), mean_b, covariance_b)


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T)


def _frechet(
    mean_a: NDArray[np.float64],
    covariance_a: NDArray[np.float64],
    root: NDArray[np.float64],
    mean_b: NDArray[np.float64],
    covariance_b: NDArray[np.float64],
) -> float:
    # Σ_a Σ_b has the eigenvalues of Σ_a^½ Σ_b Σ_a^½, which is symmetric: no complex numbers.
    mixed = np.linalg.eigvalsh(root @ covariance_b @ root)
    trace = np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(np.clip(mixed, 0, None)).sum()
    return float(np.square(mean_a - mean_b).sum() + trace)


def frechet_distance(reference: NDArray[np.floating], made: NDArray[np.floating], axes: int | None = None) -> float:
    """Fréchet distance of two sets of features.

    Args:
        reference: (N, D).
        made: (M, D).
        axes: compare along so many principal axes of the reference; ``None``: in the whole space. With fewer rows than D the distance is
            mostly noise: look at :func:`paris_ray.evaluation.intervals.split_floor`.

    Raises:
        ValueError: too few rows, other widths, or more axes than D.
    """
    a, b = np.asarray(reference, np.float64), np.asarray(made, np.float64)
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"reference has width {a.shape[1:]}, made {b.shape[1:]}; both must come from the same encoder")
    if axes is not None:
        if not 1 <= axes <= a.shape[1]:
            raise ValueError(f"axes: {axes} must lie between 1 and the features' width, {a.shape[1]}")
        basis = np.linalg.eigh(moments(a)[1])[1][:, -axes:]
        a, b = a @ basis, b @ basis
    return frechet(*moments(a), *moments(b))


class Reference:
    """Originals that many sets are compared with: what depends on them alone is worked out once.

    Args:
        features: (N, D).
    """

    def __init__(self, features: NDArray[np.floating]):
        self.features = np.asarray(features, np.float64)

    @functools.cached_property
    def _moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        mean, covariance = moments(self.features)
        return mean, covariance, _root(covariance)

    @functools.cached_property
    def _own(self) -> float:
        return _within(self.features)

    def frechet(self, made: NDArray[np.floating]) -> float:
        """The Fréchet distance of a set (M, D)."""
        return _frechet(*self._moments, *moments(made))

    def kernel(self, made: NDArray[np.floating]) -> float:
        """The kernel distance of a set (M, D).

        The unbiased estimate of the squared maximum mean discrepancy under the kernel (x·y/D + 1)³ (Bińkowski et al., arXiv 1801.01401), KID's, over
        all rows, not the mean over subsets; may be a little below zero.

        Raises:
            ValueError: fewer than two rows in either.
        """
        x, y = self.features, np.asarray(made, np.float64)
        if min(len(x), len(y)) < 2:
            raise ValueError(f"the reference has {len(x)} rows, the set {len(y)}; an unbiased estimate needs 2 of each")
        return self._own + _within(y) - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def _kernel_sum(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return sum(float(((one[i : i + _BLOCK] @ other.T / one.shape[1] + 1) ** 3).sum()) for i in range(0, len(one), _BLOCK))


def _within(one: NDArray[np.float64]) -> float:
    """Mean of the kernel over pairs of different rows."""
    diagonal = float(((np.square(one).sum(1) / one.shape[1] + 1) ** 3).sum())
    return (_kernel_sum(one, one) - diagonal) / (len(one) * (len(one) - 1))


@dataclass(frozen=True)
class PrecisionRecall:
    """How two sets of features lie in each other.

    A row's ball reaches to its k-th nearest neighbour in its own set. Precision: the share of made rows in a ball of a real one; recall: the share of
    real rows in a ball of a made one (Kynkäänniemi et al., arXiv 1904.06991). Density: in how many real balls a made row lies, over k; coverage: the
    share of real balls with a made row (Naeem et al., arXiv 2002.09797).
    """

    precision: float
    recall: float
    density: float
    coverage: float

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def precision_recall(real: NDArray[np.floating], made: NDArray[np.floating], k: int = 5) -> PrecisionRecall:
    """Precision, recall, density and coverage.

    Args:
        real: (N, D).
        made: (M, D); of recall and density, as many as of the real ones where models are to be compared.
        k: neighbours.

    Raises:
        ValueError: not more than k rows in either.
    """
    if min(len(real), len(made)) <= k:
        raise ValueError(f"real has {len(real)} rows, made {len(made)}; with k = {k} more than {k} of each are needed")
    own, theirs = _radii(real, k), _radii(made, k)
    inside_real, covered, inside_made = np.zeros(len(made), np.int64), np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows, distances in _distances(real, made):
        within = distances <= own[rows, None]
        inside_real += within.sum(0)
        covered[rows] = within.any(1)
        inside_made[rows] = (distances <= theirs[None]).any(1)
    return PrecisionRecall(float((inside_real > 0).mean()), float(inside_made.mean()), float(inside_real.mean() / k), float(covered.mean()))


def _radii(features: NDArray[np.floating], k: int) -> NDArray[np.float64]:
    """The squared distance of each row to its k-th nearest other row."""
    return np.concatenate([np.partition(distances, k, axis=1)[:, k] for _, distances in _distances(features, features)])


def _distances(a: NDArray[np.floating], b: NDArray[np.floating]) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Squared distances of rows of a to all of b, a block of rows at a time."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    centre = y.mean(0)  # differences of large numbers would lose the small distances
    x, y = x - centre, y - centre
    squares = np.square(y).sum(1)
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(x)))
        here = np.square(x[rows]).sum(1)[:, None] + squares[None] - 2 * x[rows] @ y.T
        if a is b:
            here[np.arange(here.shape[0]), np.arange(rows.start, rows.stop)] = 0.0
        yield rows, np.clip(here, 0, None)


def diversity(features: NDArray[np.floating], prompts: Sequence[Hashable]) -> NDArray[np.float64]:
    """Intra-prompt diversity: the mean cosine distance between pictures of one prompt, of each prompt with several, in the order of their first.

    The paper's is LPIPS; this is in the space of whatever encoder made the features, and is named after it.

    Args:
        features: (N, D).
        prompts: of the N pictures.

    Returns:
        (G,), between 0 (all alike) and 2.
    """
    if len(features) != len(prompts):
        raise ValueError(f"features has {len(features)} rows, prompts {len(prompts)}; they must be of the same pictures")
    rows: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    directions, found = unit(features).astype(np.float64), []
    for own in rows.values():
        if (n := len(own)) > 1:
            cosines = directions[own] @ directions[own].T
            found.append(1.0 - (cosines.sum() - np.trace(cosines)) / (n * (n - 1)))
    return np.array(found)


def clip_score(images: NDArray[np.floating], texts: NDArray[np.floating]) -> NDArray[np.float64]:
    """CLIP score of each picture and its caption (Hessel et al., arXiv 2104.08718), 100 · max(cos, 0): the scale of most tables, theirs has 2.5.

    Args:
        images: features (N, D) of a CLIP.
        texts: likewise (N, D).

    Returns:
        (N,).
    """
    if images.shape != texts.shape:
        raise ValueError(f"images have the shape {images.shape}, texts {texts.shape}; each picture needs its caption")
    return 100.0 * np.clip((unit(images).astype(np.float64) * unit(texts).astype(np.float64)).sum(1), 0, None)
