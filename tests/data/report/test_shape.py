"""Silhouette and principal components against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_samples

from paris_ray.data.report.shape import as_clustered, principal_plane, silhouettes


def blobs(n: int = 240, width: int = 9) -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng(0)
    label = g.integers(0, 4, n)
    label[label == 3] = np.where(np.arange((label == 3).sum()) == 0, 3, 2)  # cluster 3 has one row
    rows = g.standard_normal((4, width))[label] + 0.8 * g.standard_normal((n, width))
    return (rows * g.uniform(0.5, 2, (n, 1))).astype(np.float16), label * 5


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_silhouettes_are_scikit_learns(metric: str) -> None:
    stored, label = blobs()
    wide = stored.astype(np.float64)
    reference = wide / np.sqrt((wide**2).sum(1, keepdims=True)) if metric == "cosine" else wide
    found = silhouettes(as_clustered(stored, metric), label)
    np.testing.assert_allclose(found, silhouette_samples(reference, label, metric="euclidean"), atol=1e-6)
    assert found[label == 15].tolist() == [0.0]  # the only row of its cluster


def test_equal_rows_have_no_silhouette() -> None:
    assert silhouettes(np.ones((4, 3)), np.array([0, 0, 1, 1])).tolist() == [0.0] * 4


def test_the_plane_is_scikit_learns_up_to_signs_which_are_fixed() -> None:
    rows = as_clustered(blobs()[0], "cosine")
    others = rows[:7] * 0.5
    (points, moved), shares = principal_plane(rows, others)
    pca = PCA(2, svd_solver="full").fit(rows)
    np.testing.assert_allclose(shares, pca.explained_variance_ratio_, rtol=1e-9)
    signs = np.sign((points * pca.transform(rows)).sum(0))
    np.testing.assert_allclose(points * signs, pca.transform(rows), atol=1e-9)
    np.testing.assert_allclose(moved * signs, pca.transform(others), atol=1e-9)
    order = np.random.default_rng(1).permutation(len(rows))
    (again, _), _ = principal_plane(rows[order], others)
    np.testing.assert_allclose(again, points[order], atol=1e-9)  # the same way up
    for axis in pca.components_ * signs[:, None]:
        assert axis[np.abs(axis).argmax()] > 0
