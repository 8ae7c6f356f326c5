"""Rows of a corpus that is too large for one process, held by Ray actors; the mathematics is :mod:`paris_ray.data.kmeans`. Torch-free.

Rows stay where they are over all iterations: centroids go down, sums and counts come up (4 to 8 MB for 1024 × 1024). A Ray Data pipeline would start
anew, and read the corpus anew, for each of up to a hundred iterations.

An actor that dies, alone or with its node, starts again where there is room and reads its rows again; the call it died in is made again. What it
had remembered it finds again from the centroids that come with each call, so the bits do not change.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_ray.data import schema
from paris_ray.data.kmeans import Keys, Labels, Partial, Rows
from paris_ray.data.nearest import F32, Stored, scales
from paris_ray.data.placement import PROCESS_BYTES
from paris_ray.storage import Folder

Piece = tuple[str, NDArray[np.int64]]
"""A part file and the rows wanted of it, ascending."""

SMALL_BYTES = 64 << 20
"""Embeddings for which another actor is not worth its start, even where a processor is free."""

RESTARTS = 10
"""Deaths of one actor that are mended."""


def load(corpus: Folder, pieces: Sequence[Piece], width: int, metric: str, total: int) -> tuple[Stored, F32]:
    """Embeddings as stored (n, D) float16, and their scales (n,); in memory once, one part file more while it is read."""
    count = sum(len(rows) for _, rows in pieces)
    stored, scale, first = np.empty((count, width), np.float16), np.empty(count, np.float32), 0
    for name, rows in pieces:
        here = slice(first, first + len(rows))
        try:
            np.take(schema.to_numpy(schema.read_table(corpus, name, ["embedding"])["embedding"]), rows, axis=0, out=stored[here], mode="clip")
            scale[here] = scales(stored[here], metric, total)
        except ValueError as error:
            raise ValueError(f"{corpus.uri}/{name}: {error}") from error
        first += len(rows)
    return stored, scale


def ranges(pieces: Sequence[Piece], count: int) -> list[tuple[slice, list[Piece]]]:
    """Cut the sequence of rows into ``count`` almost equal ranges: (their places in it, their pieces) each."""
    total = sum(len(rows) for _, rows in pieces)
    bounds = [total * i // count for i in range(count + 1)]
    cut: list[tuple[slice, list[Piece]]] = []
    for low, high in itertools.pairwise(bounds):
        own, first = [], 0
        for name, rows in pieces:
            taken = rows[max(low - first, 0) : max(high - first, 0)]
            if len(taken):
                own.append((name, taken))
            first += len(rows)
        cut.append((slice(low, high), own))
    return cut


class RowActor:
    """A range of the rows, in an actor."""

    def __init__(self, corpus: str, pieces: list[Piece], keys: Keys, width: int, metric: str, total: int, backend: str):
        self.rows = Rows(*load(Folder(corpus), pieces, width, metric, total), keys, backend=backend)

    def call(self, method: str, *args: Any) -> Any:
        """A method of :class:`paris_ray.data.kmeans.Rows`."""
        return getattr(self.rows, method)(*args)


class RemoteRows:
    """A :class:`paris_ray.data.kmeans.RowSet` over actors.

    Args:
        corpus: ``RUN/corpus``.
        pieces: the rows, in the corpus' order.
        keys: of each row.
        width: of an embedding.
        metric: ``cosine`` or ``euclidean``.
        backend: ``numpy``, ``torch`` or ``faiss``.
        actor_bytes: embeddings of one actor at most; of smaller ones there are as many as the cluster has processors.
        say: told what is waited for.
    """

    def __init__(
        self, corpus: Folder, pieces: Sequence[Piece], keys: Keys, width: int, metric: str, backend: str, actor_bytes: int, say: Callable[[str], None]
    ):
        import ray

        self._ray, self._say, self.total, self._keys = ray, say, len(keys), keys
        size, has = 2 * width * self.total, ray.cluster_resources()
        count = max(-(-size // actor_bytes), min(int(has.get("CPU", 1)), size // SMALL_BYTES), 1)
        memory, gpus = size // count + PROCESS_BYTES, has.get("GPU", 0.0) if backend == "torch" else 0.0
        # Memory is what they need to have; asking for a processor each would leave some waiting for ever on a small cluster that could hold the rows.
        # On as many nodes as there are: each iteration takes their processors and their bandwidth to memory.
        options = {"num_cpus": 0, "memory": memory, "num_gpus": min(1.0, int(1000 * gpus / count) / 1000), "scheduling_strategy": "SPREAD"}
        actor = ray.remote(RowActor).options(**options, max_restarts=RESTARTS, max_task_retries=-1)
        cut = ranges(pieces, count)
        self._ranges = [where for where, _ in cut]
        self.actors = [actor.remote(corpus.uri, own, keys[where], width, metric, self.total, backend) for where, own in cut]
        self._each("at", [(np.arange(0),)] * count, f"actors of {memory / 2**30:.1f} GiB, which read the embeddings")

    def _each(self, method: str, args: Sequence[tuple[Any, ...]], awaited: str = "actors") -> list[Any]:
        """Call a method of all actors, each with its own arguments. No limit of time: an autoscaling cluster may take minutes to bring nodes."""
        calls = [actor.call.remote(method, *own) for actor, own in zip(self.actors, args, strict=True)]
        waiting, begun = list(calls), time.monotonic()
        while waiting:
            _, waiting = self._ray.wait(waiting, num_returns=len(waiting), timeout=10)
            if waiting:
                self._say(f"waiting for {len(waiting)} of {len(calls)} {awaited} since {time.monotonic() - begun:.0f} s")
        return [self._result(i, call, method, args[i]) for i, call in enumerate(calls)]

    def _result(self, i: int, call: Any, method: str, args: tuple[Any, ...]) -> Any:
        while True:
            try:
                return self._ray.get(call)
            except self._ray.exceptions.ObjectLostError:  # the node died after its answer, before we had it
                call = self.actors[i].call.remote(method, *args)

    def _all(self, method: str, *args: Any) -> list[Any]:
        shared = tuple(self._ray.put(arg) for arg in args)
        return self._each(method, [shared] * len(self.actors))

    def assign(self, centroids: F32, previous: F32 | None) -> Partial:
        first, *others = self._all("assign", centroids, previous)
        return sum(others, first)

    def farthest(self, n: int, centroids: F32) -> F32:
        distances, keys = (np.concatenate(column) for column in zip(*self._all("farthest_keys", n, centroids), strict=True))
        return self.take(keys[np.lexsort((keys, -distances))[:n]])

    def take(self, keys: Keys) -> F32:
        places = np.argsort(self._keys)[keys]
        here = [(places >= one.start) & (places < one.stop) for one in self._ranges]
        found = self._each("at", [(places[mine] - one.start,) for mine, one in zip(here, self._ranges, strict=True)])
        out = np.empty((len(keys), found[0].shape[1]), np.float32)
        for mine, rows in zip(here, found, strict=True):
            out[mine] = rows
        return out

    def squares(self) -> int:
        return sum(self._all("squares"))

    def labels(self, centroids: F32) -> Labels:
        return np.concatenate(self._all("labels", centroids))

    def sums_by(self, labels: Labels, k: int) -> Partial:
        first, *others = self._each("sums_by", [(labels[one], k) for one in self._ranges])
        return sum(others, first)

    def distances(self, labels: Labels, centroids: F32) -> F32:
        shared = self._ray.put(centroids)
        return np.concatenate(self._each("distances", [(labels[one], shared) for one in self._ranges]))

    def close(self) -> None:
        """Give the actors' memory back."""
        for one in self.actors:
            self._ray.kill(one)
