"""Which rows the cluster report looks at: the nearest and the farthest of each expert, and a sample by hash of id.

The corpus is passed over part by part, its light columns only; what is kept does not grow with it, but for 9 bytes a row of labels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from paris_ray.data import schema
from paris_ray.storage import Folder

CAPTION_ROWS = 200_000
"""Captions that the terms are taken from, at most; from evenly spaced part files of a larger corpus."""

AT_LEAST = 100
"""Rows of each expert in a sample, where it has them and the sample has room."""


class Extremes:
    """The ``n`` rows of the smallest values, one of each group; rows come in any order and number.

    Attributes:
        more: whether there were other groups than those kept.
    """

    def __init__(self, n: int):
        self.n, self.more = n, False
        self._kept: dict[str, tuple[float, int]] = {}
        self._worst = -math.inf

    def add(self, values: NDArray[np.floating], rows: NDArray[np.int64], groups: Sequence[str]) -> None:
        """Look at more rows: their values, their numbers in the corpus, their near-duplicate groups."""
        order = np.argsort(values, kind="stable")
        for position, i in enumerate(order.tolist()):
            value, group = float(values[i]), groups[i]
            if len(self._kept) == self.n and value >= self._worst:
                self.more = self.more or any(groups[j] not in self._kept for j in order[position:].tolist())
                return
            if group in self._kept and value >= self._kept[group][0]:
                continue
            self._kept[group] = (value, int(rows[i]))
            if len(self._kept) > self.n:
                self.more = True
                del self._kept[max(self._kept, key=lambda name: self._kept[name])]
            self._worst = max(self._kept.values())[0]

    @property
    def rows(self) -> dict[str, int]:
        """The row of each group, the smallest value first."""
        return {group: row for group, (_, row) in sorted(self._kept.items(), key=lambda item: item[1])}


class Hashed:
    """The ``n`` rows whose ids have the smallest hashes: a sample that depends on the rows alone, not on their order, files or number of machines."""

    def __init__(self, n: int):
        self.n = n
        self._hashes, self._rows = np.empty(0, np.uint64), np.empty(0, np.int64)

    def add(self, ids: Sequence[str], rows: NDArray[np.int64]) -> None:
        """Look at more rows: their ids and their numbers in the corpus."""
        new = [int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") for name in ids]
        hashes, numbers = np.concatenate([self._hashes, np.array(new, np.uint64)]), np.concatenate([self._rows, rows])
        order = np.argsort(hashes, kind="stable")[: self.n]
        self._hashes, self._rows = hashes[order], numbers[order]

    @property
    def rows(self) -> NDArray[np.int64]:
        """The rows, the smallest hash first."""
        return self._rows


def quotas(sizes: Sequence[int], limit: int) -> list[int]:
    """How many rows of each expert go into a sample of at most ``limit``: :data:`AT_LEAST` each where there are, the rest in proportion."""
    first = min(AT_LEAST, limit // max(1, len(sizes)))
    least = [min(size, first) for size in sizes]
    left = sum(sizes) - sum(least)
    share = min(1.0, (limit - sum(least)) / left) if left else 0.0
    return [base + int(share * (size - base)) for size, base in zip(sizes, least, strict=True)]


@dataclass(frozen=True)
class Members:
    """What one pass over the corpus found.

    Attributes:
        parts: its files with their numbers of rows.
        near: rows of each expert nearest to its centroid, one of each near-duplicate group, the nearest first.
        far: some of the farthest, the farthest last.
        sample: rows of each expert, the smallest hash first.
        captions: captions of evenly spaced parts.
        caption_expert: the expert of each of them.
    """

    parts: list[tuple[str, int]]
    near: list[list[int]]
    far: list[list[int]]
    sample: list[NDArray[np.int64]]
    captions: list[str]
    caption_expert: NDArray[np.int32]


def look(run: Folder, sizes: Sequence[int], shown: int, sampled: int) -> Members:
    """Pass over ``RUN/corpus`` once.

    Args:
        run: the run directory, with its labels.
        sizes: train rows of each expert.
        shown: pictures on an expert's sheet.
        sampled: rows in the sample, of all experts together.
    """
    corpus = run / "corpus"
    labels = schema.read_labels(run / "clusters", ["expert", "split", "distance"])
    expert, distance = labels["expert"].to_numpy(), labels["distance"].to_numpy()
    train = pc.equal(labels["split"], "train").to_numpy()
    del labels
    near, far = [Extremes(shown) for _ in sizes], [Extremes(shown) for _ in sizes]
    samples = [Hashed(quota) for quota in quotas(sizes, sampled)]
    every = math.ceil(len(expert) / CAPTION_ROWS)
    parts: list[tuple[str, int]] = []
    captions: list[str] = []
    caption_expert: list[NDArray[np.int32]] = []
    first = 0

    def read(numbered: tuple[int, str]) -> tuple[str, pa.Table]:
        i, name = numbered
        return name, schema.read_table(corpus, name, ["id", "group", *(["caption"] if i % every == 0 else [])])

    for name, table in schema.ahead(read, enumerate(schema.parts(corpus))):
        own = slice(first, first + len(table))
        for k in range(len(sizes)):
            at = np.flatnonzero(train[own] & (expert[own] == k))
            if not len(at):
                continue
            light = table.select(["id", "group"]).take(pa.array(at))
            groups, values = light["group"].to_pylist(), distance[own][at]
            near[k].add(values, first + at, groups)
            far[k].add(-values, first + at, groups)
            samples[k].add(light["id"].to_pylist(), first + at)
        if "caption" in table.column_names:
            captions += table["caption"].to_pylist()
            caption_expert.append(expert[own])
        parts.append((name, len(table)))
        first += len(table)
    sheets = [_sheet(a, b) for a, b in zip(near, far, strict=True)]
    said = np.concatenate([np.empty(0, np.int32), *caption_expert])
    return Members(parts, [a for a, _ in sheets], [b for _, b in sheets], [one.rows for one in samples], captions, said)


def _sheet(near: Extremes, far: Extremes) -> tuple[list[int], list[int]]:
    """Rows of a sheet: an eighth of it are the farthest, unless all groups fit on it."""
    count = near.n // 8 if near.more else 0
    nearest = dict(list(near.rows.items())[: near.n - count])
    farthest = [row for group, row in far.rows.items() if group not in nearest][:count]
    return list(nearest.values()), farthest[::-1]


Parts = Sequence[tuple[str, int]]
"""Files of the corpus with their numbers of rows."""


def read_rows(corpus: Folder, parts: Parts, wanted: NDArray[np.int64], columns: Sequence[str]) -> Iterator[tuple[NDArray[np.int64], pa.Table]]:
    """Some columns of the wanted rows (ascending, each once), row group by row group; files and row groups without any are not read."""
    first = 0
    for name, count in parts:
        low, high = np.searchsorted(wanted, (first, first + count))
        if high > low:
            with corpus.open(name) as source, pq.ParquetFile(source) as content:
                start = first
                for group in range(content.num_row_groups):
                    end = start + content.metadata.row_group(group).num_rows
                    own = wanted[slice(*np.searchsorted(wanted, (start, end)))]
                    if len(own):
                        yield own, content.read_row_group(group, columns=list(columns)).take(pa.array(own - start))
                    start = end
        first += count
