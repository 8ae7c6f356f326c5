"""The clusters' shape in the space of the embeddings, on a sample of rows: a flat map, and how far apart they are. Plain NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def as_clustered(rows: NDArray[np.floating], metric: str) -> F64:
    """Rows as k-means sees them: of unit length for ``cosine``."""
    wide = rows.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True) if metric == "cosine" else wide


def principal_plane(rows: F64, *others: F64) -> tuple[list[F64], tuple[float, float]]:
    """Principal component analysis by SVD of the centred rows; the signs are fixed, so equal rows give equal maps.

    Args:
        rows: (N, D), on which it is fitted; N, D ≥ 2.
        others: further rows to be put on the same map.

    Returns:
        coordinates (n, 2) of ``rows`` and of each of ``others``, and the shares of the rows' variance along the two axes.
    """
    mean = rows.mean(0)
    _, values, axes = np.linalg.svd(rows - mean, full_matrices=False)
    plane = axes[:2]
    # A component's sign is arbitrary: its largest entry is made positive.
    largest = np.abs(plane).argmax(1)
    plane = plane * np.sign(plane[np.arange(len(plane)), largest])[:, None]
    energy = values**2
    shares = energy[:2] / (energy.sum() or 1.0)
    return [(one - mean) @ plane.T for one in (rows, *others)], (float(shares[0]), float(shares[1]))


def silhouettes(rows: F64, label: NDArray[np.integer]) -> F64:
    """Silhouette of each row by Euclidean distance (Rousseeuw 1987): (b − a) / max(a, b).

    a is the mean distance to the other rows of its cluster, b the smallest mean distance to the rows of another cluster; 0 for the only row of a
    cluster. Takes N² memory and time: for samples.

    Args:
        rows: (N, D).
        label: the cluster of each; at least two different ones.
    """
    squares = np.einsum("nd,nd->n", rows, rows)
    distance = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * rows @ rows.T, 0.0))
    np.fill_diagonal(distance, 0.0)
    clusters, own = np.unique(label, return_inverse=True)
    member = (own[:, None] == np.arange(len(clusters))).astype(np.float64)  # (N, K)
    counts = member.sum(0)
    sums = distance @ member  # (N, K)
    here = np.arange(len(rows))
    a = sums[here, own] / np.maximum(counts[own] - 1, 1)
    means = sums / counts
    means[here, own] = np.inf
    b = means.min(1)
    larger = np.maximum(a, b)
    value = np.divide(b - a, larger, out=np.zeros_like(a), where=larger > 0)
    return np.where(counts[own] == 1, 0.0, value)
