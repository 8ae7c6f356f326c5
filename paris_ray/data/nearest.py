"""The nearest centroid of each row: one function with three backends, ``numpy``, ``torch`` (CPU or GPU) and ``faiss``, and one answer.

Which centroid is nearest is decided in float64, one row and one centroid at a time. Matrix products in float32 come before and sort out those that
cannot be it, by a bound on their rounding; for nearly every row they leave one. So a label depends on the row and the centroids alone: not on the
row's place, the shape of a product, the number of threads, the library or the device, all of which round differently.

Rows are used as they are stored (float16) and brought into units of :data:`GRID` piece by piece: whole numbers, of which float64 sums are exact and
have no order.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

GRID = 2.0**-24
"""Spacing of all float16 numbers."""

BLOCK = 16_384
"""Rows that one thread takes at a time."""

BATCH = 512
"""Rows that it works on at a time where it needs several copies of them, float64 or gathered: these stay in the cache."""

F32 = NDArray[np.float32]
Stored = NDArray[np.floating]
"""Rows as stored, (n, D) float16 or float32."""

Nearest = Callable[[Stored, F32], NDArray[np.int32]]
"""(rows as stored (n, D), their scale (n,)) → the nearest centroid of each, (n,); of equally near ones the first."""


def scales(stored: Stored, metric: str, total: int) -> F32:
    """What to multiply each row by to get it in units of :data:`GRID`, at unit length for ``cosine``: (n,).

    Args:
        stored: (n, D).
        metric: ``cosine`` or ``euclidean``.
        total: rows in the whole corpus, here and elsewhere.

    Raises:
        ValueError: a row is not finite or has no direction, or the values are too large for exact sums of ``total`` rows.
    """
    scale = np.full(len(stored), 1 / GRID, np.float32)
    for low in range(0, len(stored), BATCH):
        wide = stored[low : low + BATCH].astype(np.float64)
        if not (fine := np.isfinite(wide).all(1)).all():
            raise ValueError(f"embedding: row {low + int(fine.argmin())} is not finite; embed the corpus again")
        if metric == "cosine":
            norms = np.sqrt(np.einsum("nd,nd->n", wide, wide))
            if not norms.all():
                raise ValueError(f"embedding: row {low + int(norms.argmin())} is zero and has no direction; use partition.metric=euclidean")
            scale[low : low + BATCH] = 1 / GRID / norms
        largest = 1.0 if metric == "cosine" else float(np.abs(wide).max(initial=0.0))
        if total * largest >= 2.0**53 * GRID:
            raise ValueError(
                f"embedding: {total} rows of values up to {largest:g} have no exact float64 sum (limit 2²⁹); use partition.metric=cosine"
            )
    return scale


def prepare(stored: Stored, scale: F32, out: F32 | None = None) -> F32:
    """Rows as clustered: (n, D) whole numbers, in units of :data:`GRID`."""
    out = np.empty(stored.shape, np.float32) if out is None else out
    np.copyto(out, stored)
    np.multiply(out, scale[:, None], out=out)
    return np.rint(out, out=out)


# -- exactly ------------------------------------------------------------------------------------------------------------


class _Centroids:
    """Centroids (K, D), and what follows from them. A score is |x − c|² − |x|² = |c|² − 2x·c."""

    def __init__(self, centroids: F32):
        self.k, self.width = centroids.shape
        self.narrow, self.wide = centroids, centroids.astype(np.float64)
        self.squares = np.einsum("kd,kd->k", self.wide, self.wide)
        self.longest = math.sqrt(self.squares.max())

    def factor(self) -> tuple[F32, F32]:
        """(F, f) such that ``rows @ F + f`` are the scores of rows in units of the grid."""
        return np.ascontiguousarray((-2 * GRID * self.wide.T).astype(np.float32)), self.squares.astype(np.float32)

    def slack(self, rows: Any) -> Any:
        """By how much a float32 score may be above the least one and yet be less: twice the largest error; of array or tensor (n, D), (n,).

        A product of D terms errs by at most D·u·|x|·|c| in any order of its sum (Higham 2002, eq. 3.5), u = 2⁻²⁴; rounding 2x·c, |c|², |x|² (faiss
        adds it) and their sums errs by at most the other terms.
        """
        length = (rows * rows).sum(1) ** 0.5 * GRID
        return 2.1 * 2.0**-24 * ((2 * self.width + 4) * length * self.longest + 4 * (self.longest**2 + length**2))

    def decide(self, rows: F32, owner: NDArray[np.int64], candidate: NDArray[np.int64]) -> NDArray[np.int64]:
        """The nearest candidate of each row, of equally near ones the first.

        Args:
            rows: (n, D), in units of the grid.
            owner: the row of each pair, ascending, each row at least once.
            candidate: the centroid of each pair, ascending for a row.
        """
        scores = np.empty(len(owner))
        for low in range(0, len(owner), BATCH):
            x, k = rows[owner[low : low + BATCH]], candidate[low : low + BATCH]
            scores[low : low + BATCH] = self.squares[k] - 2 * GRID * np.einsum("pd,pd->p", x.astype(np.float64), self.wide[k])
        first = np.flatnonzero(np.diff(owner, prepend=-1))
        least = np.repeat(np.minimum.reduceat(scores, first), np.diff(first, append=len(owner)))
        best = np.flatnonzero(scores == least)
        return candidate[best[np.unique(owner[best], return_index=True)[1]]]


# -- backends -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nearest_to(backend: str, centroids: F32) -> Iterator[Nearest]:
    """The function that finds the nearest of the centroids (K, D), in units of 1. Threads may share it; each of its products runs on one thread.

    Args:
        backend: ``numpy``, ``torch`` or ``faiss``.
        centroids: (K, D).

    Raises:
        ImportError: the backend is not installed.
    """
    make, limit = {"numpy": (_numpy, one_blas_thread), "torch": (_torch, _one_torch_thread), "faiss": (_faiss, one_blas_thread)}[backend]
    nearest = make(_Centroids(centroids))
    with limit(backend):
        yield nearest


def _tile(k: int) -> int:
    """Rows in one product: its result, about 1 MB, stays in the cache until it has been read."""
    return 1 << max(8, min(12, 18 - (k - 1).bit_length()))


def _numpy(centroids: _Centroids) -> Nearest:
    factor, add = centroids.factor()
    return _on_cpu(centroids, add, lambda rows, out: np.matmul(rows, factor, out=out))


def _on_cpu(centroids: _Centroids, add: F32, product: Callable[[F32, F32], object]) -> Nearest:
    tile = _tile(centroids.k)

    def nearest(stored: Stored, scale: F32) -> NDArray[np.int32]:
        labels = np.empty(len(stored), np.int32)
        rows, scores = np.zeros((tile, centroids.width), np.float32), np.empty((tile, centroids.k), np.float32)
        for low in range(0, len(stored), tile):
            n = min(tile, len(stored) - low)
            x, score, every = prepare(stored[low : low + n], scale[low : low + n], rows[:n]), scores[:n], np.arange(n)
            product(rows, scores)  # below the n are zeros, or rows of the tile before
            score += add
            found = score.argmin(1)
            least = score[every, found]
            most = least + centroids.slack(x)
            score[every, found] = np.inf
            near = np.flatnonzero(score.min(1) <= most)
            if len(near):
                score[near, found[near]] = least[near]
                found[near] = centroids.decide(x[near], *np.nonzero(score[near] <= most[near, None]))
            labels[low : low + n] = found
        return labels

    return nearest


def _torch(centroids: _Centroids) -> Nearest:
    import torch

    if not torch.cuda.is_available():
        factor, add = centroids.factor()
        there = torch.from_numpy(factor)
        # What comes after the product is several times faster in NumPy.
        return _on_cpu(centroids, add, lambda rows, out: torch.mm(torch.from_numpy(rows), there, out=torch.from_numpy(out)))
    factor_, add_ = (torch.from_numpy(array).cuda() for array in centroids.factor())

    def nearest(stored: Stored, scale: F32) -> NDArray[np.int32]:
        rows = torch.from_numpy(stored).cuda().float().mul_(torch.from_numpy(scale).cuda()[:, None]).round_()
        scores = torch.addmm(add_, rows, factor_)
        least, found = scores.min(1)
        most = least + centroids.slack(rows)
        others = scores.scatter(1, found[:, None], torch.inf).amin(1)
        near = torch.nonzero(others <= most)[:, 0]
        labels = found.cpu().numpy()
        if len(near):
            owner, candidate = (index.cpu().numpy() for index in torch.nonzero(scores[near] <= most[near, None], as_tuple=True))
            labels[near.cpu().numpy()] = centroids.decide(rows[near].cpu().numpy(), owner, candidate)
        return labels.astype(np.int32)

    return nearest


def _faiss(centroids: _Centroids) -> Nearest:
    import faiss

    index = faiss.IndexFlatL2(centroids.width)
    index.add(np.ascontiguousarray(centroids.narrow))
    several = min(4, centroids.k)

    def some(rows: F32) -> NDArray[np.int64]:
        distances, found = index.search(rows * np.float32(GRID), several)
        near = distances <= distances[:, :1] + centroids.slack(rows)[:, None]
        labels, wide = found[:, 0], near[:, -1]  # where the last is near, one more may be
        if len(few := np.flatnonzero(near[:, 1:].any(1) & ~wide)):
            owner, place = np.nonzero(near[few])
            candidate = found[few][owner, place]
            order = np.lexsort((candidate, owner))
            labels[few] = centroids.decide(rows[few], owner[order], candidate[order])
        if len(many := np.flatnonzero(wide)):
            labels[many] = centroids.decide(rows[many], *np.divmod(np.arange(len(many) * centroids.k), centroids.k))
        return labels

    def nearest(stored: Stored, scale: F32) -> NDArray[np.int32]:
        faiss.omp_set_num_threads(1)  # of this thread
        tiles = [slice(low, low + 4096) for low in range(0, len(stored), 4096)]
        return np.concatenate([some(prepare(stored[tile], scale[tile])) for tile in tiles], dtype=np.int32, casting="same_kind")

    return nearest


@functools.cache
def _controller(backend: str) -> Any:
    """Of the BLAS libraries that are loaded when a backend is."""
    import threadpoolctl

    return threadpoolctl.ThreadpoolController()


@contextlib.contextmanager
def one_blas_thread(backend: str = "numpy") -> Iterator[None]:
    """Matrix products of NumPy (and of a backend that is loaded) on one thread each."""
    with _controller(backend).limit(limits=1, user_api="blas"):
        yield


@contextlib.contextmanager
def _one_torch_thread(backend: str) -> Iterator[None]:
    import torch

    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # the bound on rounding is that of float32
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
