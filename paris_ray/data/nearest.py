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

BATCH = 1024
"""Rows that it works on at a time where it needs several copies of them, float64 or gathered: these stay in the cache."""

F32 = NDArray[np.float32]
Stored = NDArray[np.floating]
"""Rows as stored, (n, D) float16 or float32."""

Nearest = Callable[[Stored, F32], tuple[NDArray[np.int32], F32]]
"""(rows as stored (n, D), their scale (n,)) → the nearest centroid of each, of equally near ones the first; and by how much, at least, it is nearer
than any other (the room); both (n,)."""


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
    if stored.dtype == np.float16:
        # NumPy converts one number at a time. Here: sign, exponent and fraction to their places in a float32, then its other bias of the exponent.
        bits = out.view(np.int32)
        np.copyto(bits, stored.view(np.int16))
        np.left_shift(bits, 13, out=bits)
        np.bitwise_and(bits, np.int32(-0x70000001), out=bits)
        np.multiply(out, np.float32(2.0**112), out=out)
    else:
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

    def error(self, x2: Any) -> Any:
        """Largest error of a float32 score, for rows of squared lengths (n,), as an array or a tensor.

        A product of D terms errs by at most D·u·|x|·|c| in any order of its sum (Higham 2002, eq. 3.5), u = 2⁻²⁴; rounding 2x·c, |c|², |x|² (faiss
        adds it) and their sums errs by at most the other terms.
        """
        return 1.05 * 2.0**-24 * ((2 * self.width + 4) * x2**0.5 * self.longest + 4 * (self.longest**2 + x2))

    def room(self, x2: Any, least: Any, second: Any, error: Any) -> Any:
        """By how much the nearest centroid is nearer than the second, at least, from float32 scores; below 0 where they leave it open."""
        more = x2 * (1 + self.width * 2.0**-23)  # x2 is a float32 sum, too; more of it is less room
        near, far = (more + least + error).clip(0) ** 0.5, (more + second - error).clip(0) ** 0.5
        return far - near - 1e-5 * (x2**0.5 + self.longest)  # far above the rounding in here and in decide

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


def _squares(rows: F32) -> F32:
    squares: F32 = np.einsum("nd,nd->n", rows, rows) * np.float32(GRID**2)
    return squares


def _tile(k: int) -> int:
    """Rows in one product: its result, about 4 MB, stays in the cache until it has been read."""
    return 1 << max(8, min(12, 20 - (k - 1).bit_length()))


def _numpy(centroids: _Centroids) -> Nearest:
    factor, add = centroids.factor()
    return _on_cpu(centroids, add, lambda rows, out: np.matmul(rows, factor, out=out))


def _on_cpu(centroids: _Centroids, add: F32, product: Callable[[F32, F32], object]) -> Nearest:
    tile = _tile(centroids.k)

    def nearest(stored: Stored, scale: F32) -> tuple[NDArray[np.int32], F32]:
        labels, room = np.empty(len(stored), np.int32), np.empty(len(stored), np.float32)
        most = min(tile, len(stored))
        all_rows, all_scores = np.empty((most, centroids.width), np.float32), np.empty((most, centroids.k), np.float32)
        for low in range(0, len(stored), tile):
            here = slice(low, min(low + tile, len(stored)))
            n = here.stop - low
            rows, scores, every = prepare(stored[here], scale[here], all_rows[:n]), all_scores[:n], np.arange(n)
            product(rows, scores)
            scores += add
            found = scores.argmin(1)
            least = scores[every, found]
            scores[every, found] = np.inf
            x2, second = _squares(rows), scores.min(1)
            error = centroids.error(x2)
            room[here] = centroids.room(x2, least, second, error)
            limit = least + 2 * error
            open_ = np.flatnonzero(second <= limit)
            if len(open_):
                scores[open_, found[open_]] = least[open_]
                found[open_] = centroids.decide(rows[open_], *np.nonzero(scores[open_] <= limit[open_, None]))
            labels[here] = found
        return labels, room

    return nearest


def _torch(centroids: _Centroids) -> Nearest:
    import torch

    if not torch.cuda.is_available():
        factor, add = centroids.factor()
        there = torch.from_numpy(factor)
        # What comes after the product is several times faster in NumPy.
        return _on_cpu(centroids, add, lambda rows, out: torch.mm(torch.from_numpy(rows), there, out=torch.from_numpy(out)))
    factor_, add_ = (torch.from_numpy(array).cuda() for array in centroids.factor())

    def nearest(stored: Stored, scale: F32) -> tuple[NDArray[np.int32], F32]:
        rows = torch.from_numpy(stored).cuda().float().mul_(torch.from_numpy(scale).cuda()[:, None]).round_()
        scores = torch.addmm(add_, rows, factor_)
        least, found = scores.min(1)
        second = scores.scatter(1, found[:, None], torch.inf).amin(1)
        x2 = (rows * rows).sum(1) * GRID**2
        error = centroids.error(x2)
        limit = least + 2 * error
        open_ = torch.nonzero(second <= limit)[:, 0]
        labels = found.cpu().numpy()
        if len(open_):
            owner, candidate = (index.cpu().numpy() for index in torch.nonzero(scores[open_] <= limit[open_, None], as_tuple=True))
            labels[open_.cpu().numpy()] = centroids.decide(rows[open_].cpu().numpy(), owner, candidate)
        return labels.astype(np.int32), centroids.room(x2, least, second, error).cpu().numpy()

    return nearest


def _faiss(centroids: _Centroids) -> Nearest:
    import faiss

    index = faiss.IndexFlatL2(centroids.width)
    index.add(np.ascontiguousarray(centroids.narrow))
    several = min(4, centroids.k)

    def nearest(stored: Stored, scale: F32) -> tuple[NDArray[np.int32], F32]:
        faiss.omp_set_num_threads(1)  # of this thread
        labels, room = np.empty(len(stored), np.int32), np.empty(len(stored), np.float32)
        for low in range(0, len(stored), 4096):
            here = slice(low, min(low + 4096, len(stored)))
            rows = prepare(stored[here], scale[here])
            distances, found = index.search(rows * np.float32(GRID), several)
            x2, label = _squares(rows), found[:, 0]
            error = centroids.error(x2)
            room[here] = centroids.room(x2, distances[:, 0] - x2, distances[:, 1] - x2, error)
            near = distances <= distances[:, :1] + 2 * error[:, None]
            wide = near[:, -1]  # one more may be
            if len(few := np.flatnonzero(near[:, 1] & ~wide)):
                owner, place = np.nonzero(near[few])
                candidate = found[few][owner, place]
                order = np.lexsort((candidate, owner))
                label[few] = centroids.decide(rows[few], owner[order], candidate[order])
            if len(many := np.flatnonzero(wide)):
                label[many] = centroids.decide(rows[many], *np.divmod(np.arange(len(many) * centroids.k), centroids.k))
            labels[here] = label
        return labels, room

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
