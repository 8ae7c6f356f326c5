"""Rows of a corpus that is too large for one process, held by Ray actors; the mathematics is :mod:`paris_ray.data.kmeans`. Torch-free.

Rows stay where they are over all iterations: centroids go down, sums and counts come up (4 to 8 MB for 1024 × 1024). A Ray Data pipeline would start
anew, and read the corpus anew, for each of up to a hundred iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_ray.data import schema
from paris_ray.data.kmeans import CHUNK, F32, Partial, Rows, prepare
from paris_ray.storage import Folder

Piece = tuple[str, NDArray[np.int64]]
"""A part file and the rows wanted of it, ascending."""


def load_rows(corpus: Folder, pieces: list[Piece], metric: str, total: int) -> list[F32]:
    """Embeddings as clustered, one array per piece."""
    loaded = []
    for name, rows in pieces:
        try:
            stored = schema.to_numpy(schema.read_table(corpus, name, ["embedding"])["embedding"])[rows]
            loaded.append(prepare(stored, metric, total))
        except ValueError as error:
            raise ValueError(f"{corpus.uri}/{name}: {error}") from error
    return loaded


def slices(pieces: list[Piece], chunks_each: int) -> list[tuple[int, list[Piece]]]:
    """Cut the sequence of rows into ranges of whole chunks: (global index of the first row, its pieces) each."""
    size = chunks_each * CHUNK
    ranges: list[tuple[int, list[Piece]]] = []
    position = 0
    for name, rows in pieces:
        first = 0
        while first < len(rows):
            if position % size == 0:
                ranges.append((position, []))
            taken = rows[first : first + size - position % size]
            ranges[-1][1].append((name, taken))
            first, position = first + len(taken), position + len(taken)
    return ranges


class RowActor:
    """A range of the rows, in an actor."""

    def __init__(self, corpus: str, pieces: list[Piece], start: int, metric: str, total: int):
        self.rows = Rows(load_rows(Folder(corpus), pieces, metric, total), start)

    def call(self, method: str, *args: Any) -> Any:
        """A method of :class:`paris_ray.data.kmeans.Rows`."""
        return getattr(self.rows, method)(*args)

    def labels(self) -> NDArray[np.int32]:
        """Labels of the last assignment."""
        return self.rows.labels


class RemoteRows:
    """A :class:`paris_ray.data.kmeans.RowSet` over actors of about ``actor_bytes`` each.

    Args:
        corpus: ``RUN/corpus``.
        pieces: the rows, in global order.
        width: of an embedding.
        metric: ``cosine`` or ``euclidean``.
        actor_bytes: float32 rows of one actor, in bytes.
        say: told how many actors are ready.
    """

    def __init__(self, corpus: Folder, pieces: list[Piece], width: int, metric: str, actor_bytes: int, say: Callable[[str], None]):
        import ray

        self._ray = ray
        self.total = sum(len(rows) for _, rows in pieces)
        ranges = slices(pieces, max(1, actor_bytes // (CHUNK * width * 4)))
        # Memory is what they need to have; asking for a processor each would leave some waiting for ever on a small cluster that could hold the rows.
        actor = ray.remote(RowActor).options(num_cpus=0, memory=3 * actor_bytes, max_restarts=0)
        self.starts = np.array([start for start, _ in ranges])
        self.actors = [actor.remote(corpus.uri, own, start, metric, self.total) for start, own in ranges]
        waiting = [one.labels.remote() for one in self.actors]
        while waiting:
            # Without a limit: an autoscaling cluster may take minutes to bring the nodes.
            done, waiting = ray.wait(waiting, timeout=10)
            ray.get(done)
            if waiting:
                say(f"reading embeddings: {len(waiting)} of {len(ranges)} actors of {3 * actor_bytes / 2**30:.1f} GiB not ready")

    def _all(self, method: str, *args: Any) -> list[Any]:
        shared = [self._ray.put(arg) for arg in args]
        result: list[Any] = self._ray.get([one.call.remote(method, *shared) for one in self.actors])
        return result

    def assign(self, centroids: F32) -> Partial:
        parts: list[Partial] = self._all("assign", centroids)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def farthest(self, n: int) -> F32:
        found = self._all("farthest_indices", n)
        distances, indices = (np.concatenate(column) for column in zip(*found, strict=True))
        return self.take(indices[np.lexsort((indices, -distances))[:n]])

    def take(self, indices: NDArray[np.int64]) -> F32:
        owner = np.searchsorted(self.starts, indices, side="right") - 1
        found = [(np.flatnonzero(owner == k), k) for k in np.unique(owner)]
        rows = self._ray.get([self.actors[k].call.remote("take", indices[at]) for at, k in found])
        out = np.empty((len(indices), rows[0].shape[1] if rows else 0), np.float32)
        for (at, _), part in zip(found, rows, strict=True):
            out[at] = part
        return out

    def squares(self) -> list[float]:
        return [value for part in self._all("squares") for value in part]

    def distances_to(self, centroids: F32, choice: NDArray[np.int64]) -> F32:
        return np.concatenate(self._all("distances_to", centroids, choice))

    @property
    def labels(self) -> NDArray[np.int32]:
        return np.concatenate(self._ray.get([one.labels.remote() for one in self.actors]))

    def close(self) -> None:
        """Give the actors' memory back."""
        for one in self.actors:
            self._ray.kill(one)
