"""Rows that a finished corpus has twice: equal ones, of which one stays, and near-duplicates, which share one split. No Ray here.

Of each row the driver holds 33 bytes: id, perceptual hash, group and split. While it looks for duplicates it takes as much again, 70 in all where
few rows look alike.
"""

from __future__ import annotations

import collections
import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from paris_ray.data import schema
from paris_ray.data.phash import near_components
from paris_ray.data.splits import NEAR_DUPLICATES, split_codes
from paris_ray.storage import Folder

NEAR = pa.schema(
    [
        ("id", pa.string()),
        ("group", pa.string()),
        ("split", pa.string()),
        ("of", pa.string()),
        ("part", pa.int32()),
        ("row", pa.int32()),
    ]
)
"""Columns of the file of :data:`NEAR_DUPLICATES`: a row, its group, the split of its component, the component's first row, and where the row lies."""

_ID = np.dtype("S16")

_BLOCK = 1 << 16
"""Rows compared or moved at once, so that nothing is copied whole."""


@dataclass(slots=True)
class Rows:
    """What is held of each row of a corpus.

    Args:
        names: the part files.
        sizes: (P,) rows of each.
        ids: (N,) 16 bytes each.
        hashes: (N,) perceptual hashes.
        groups: (N,) hashes of the groups' names.
        splits: (N,) indices into ``SPLITS``, as drawn or given.
        given: (P,) whether the source of a part gives the splits of its rows; these take no part in the search for near-duplicates.
    """

    names: list[str]
    sizes: NDArray[np.int64]
    ids: NDArray[np.bytes_]
    hashes: NDArray[np.uint64]
    groups: NDArray[np.uint64]
    splits: NDArray[np.int8]
    given: NDArray[np.bool_]

    def by_part(self, values: NDArray[np.generic]) -> dict[str, NDArray[np.generic]]:
        """An array over all rows, cut into those of each part."""
        return dict(zip(self.names, np.split(values, np.cumsum(self.sizes)[:-1]), strict=True))

    def keep(self, kept: NDArray[np.bool_]) -> None:
        """Forget all other rows."""
        self.sizes = np.array([part.sum() for part in self.by_part(kept).values()], np.int64)
        for column in (self.ids, self.hashes, self.groups, self.splits):
            at = 0
            for low in range(0, len(kept), _BLOCK):
                stay = column[low : low + _BLOCK][kept[low : low + _BLOCK]]
                column[at : at + len(stay)] = stay
                at += len(stay)
            column.resize(at, refcheck=False)


def read_rows(corpus: Folder) -> Rows:
    """Read what is needed of all rows, published or not."""
    names: list[str] = []
    sizes: list[int] = []
    given: list[bool] = []
    columns = [np.empty(0, kind) for kind in (_ID, np.uint64, np.uint64, np.int8)]
    for name, content, notes in schema.read_each(corpus, ["id", "phash", "group", "split"], schema.written(corpus)):
        ids = np.frombuffer(bytes.fromhex("".join(content["id"].to_pylist())), _ID)
        groups = np.array([_short(group) for group in content["group"].to_pylist()], np.uint64)
        first = len(columns[0])
        for column, more in zip(columns, (ids, content["phash"].to_numpy().view(np.uint64), groups, split_codes(content["split"])), strict=True):
            column.resize(first + len(more), refcheck=False)  # where it is: the system moves pages, not bytes
            column[first:] = more
        names.append(name)
        sizes.append(len(ids))
        given.append(schema.SPLIT_GIVEN in notes)
    all_ids, hashes, own, splits = columns
    return Rows(names, np.array(sizes, np.int64), all_ids, hashes, own, splits, np.array(given, bool))


def _short(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def first_of_equals(ids: NDArray[np.bytes_]) -> NDArray[np.bool_]:
    """Which rows to keep so that each id is there once: the first with it."""
    order = np.argsort(ids, kind="stable")
    keep = np.ones(len(ids), bool)
    for low in range(1, len(ids), _BLOCK):
        here = order[low : low + _BLOCK]
        keep[here] = ids[here] != ids[order[low - 1 : low - 1 + len(here)]]
    return keep


def drop(run: Folder, name: str, kept: NDArray[np.bool_]) -> None:
    """Move rows of a part to the rejects, as duplicates of rows that stay.

    The rejects come first: of a run that dies between the two files they are found again, and the rows are dropped then. Ray calls again where a
    worker dies after them.
    """
    corpus, rejected = run / "corpus", run / "rejected"
    if schema.count_rows(corpus, [name]) == [kept.sum()]:
        return
    old = schema.read_table(rejected, name).to_pylist() if rejected.exists(name) else []
    light = schema.read_table(corpus, name, ["source", "id"]).filter(pa.array(~kept)).to_pylist()
    dropped = collections.Counter((row["source"], f"duplicate: of {row['id']}") for row in light)
    dropped -= collections.Counter((row["source"], row["reason"]) for row in old)
    new = [{"source": source, "reason": reason} for source, reason in dropped.elements()]
    if new:
        schema.write_table(rejected, name, pa.Table.from_pylist(old + new, schema=schema.REJECTED))
    with corpus.open(name) as source, pq.ParquetFile(source) as content:
        start = 0
        with schema.PartWriter(corpus, name, content.schema_arrow.remove_metadata(), schema.notes(content)) as writer:
            for group in range(content.num_row_groups):
                table = content.read_row_group(group, use_threads=False).replace_schema_metadata(None)
                writer.write(table.filter(pa.array(kept[start : start + len(table)])))
                start += len(table)


def join_near_duplicates(corpus: Folder, rows: Rows, settled: int = 0, version: int = 1) -> dict[str, int]:
    """Find rows that look like rows of another group, give each such component one split, and write the file of :data:`NEAR_DUPLICATES`.

    A component is in ``train`` if one of its rows is: the codec and the clusters are fitted to rows drawn as ``train``, and no row that looks like
    one of these may stand for unseen ones. Else it is in ``validation`` if one of its rows is. Settled rows that do not look like each other may come
    together by a later row that looks like both. Where they are of several splits, that row and all later ones of the component are ``unused``.

    Args:
        corpus: ``RUN/corpus``.
        rows: all of it.
        settled: so many first rows, with the splits they have now, have been clustered and trained on: rows that came later follow them.
        version: of the corpus that these rows will be.

    Returns:
        counts: ``groups`` of the corpus, ``near_duplicates`` (rows listed), ``split_changed`` (of them), ``unchecked`` hashes.
    """
    node, hashes, own = _nodes(rows)
    component, unchecked = near_components(hashes, own)
    del hashes, own
    component = np.append(component, np.int32(len(component)))  # that of rows which are not compared
    alone = np.bincount(component, minlength=1) == 1
    at = np.flatnonzero(~alone[component][node])
    found, mine = np.unique(component[node[at]], return_inverse=True)
    del node, component, alone
    split, last = (np.full(len(found), none, np.int8) for none in (len(schema.SPLITS), -1))
    first = np.zeros(len(found), np.int64)
    old = at < settled
    np.minimum.at(split, mine[old], rows.splits[at[old]])
    np.maximum.at(last, mine[old], rows.splits[at[old]])
    split[last > split] = schema.SPLITS.index("unused")
    led = split[mine] < len(schema.SPLITS)
    np.minimum.at(split, mine[~led], rows.splits[at[~led]])
    chosen = np.where(old, rows.splits[at], split[mine])
    by_id = np.lexsort((rows.ids[at], ~old))[::-1]
    first[mine[by_id]] = at[by_id]  # the last one written is the smallest id, of settled rows if there are any
    starts = np.cumsum(rows.sizes) - rows.sizes
    with schema.PartWriter(corpus, schema.version_name(NEAR_DUPLICATES, version), NEAR) as writer:
        spans = {name: (low, slice(*np.searchsorted(at, [low, low + n]))) for name, low, n in zip(rows.names, starts, rows.sizes, strict=True)}
        for name, content, _ in schema.read_each(corpus, ["group"], [name for name, (_, span) in spans.items() if span.stop > span.start]):
            low, span = spans[name]
            here, row = at[span], at[span] - low
            writer.write(
                pa.table(
                    {
                        "id": [name_of(one) for one in rows.ids[here]],
                        "group": content["group"].take(pa.array(row)),
                        "split": [schema.SPLITS[code] for code in chosen[span]],
                        "of": [name_of(one) for one in rows.ids[first[mine[span]]]],
                        "part": np.full(len(here), schema.part_number(name), np.int32),
                        "row": row.astype(np.int32),
                    },
                    NEAR,
                )
            )
    changed = int((chosen != rows.splits[at]).sum())
    rows.splits[at] = chosen
    return {"groups": _distinct(rows.groups), "near_duplicates": len(at), "split_changed": changed, "unchecked": unchecked}


def _nodes(rows: Rows) -> tuple[NDArray[np.int32], NDArray[np.uint64], NDArray[np.uint64]]:
    """Rows of one group that look the same are one node: (N,) the node of each row, and hash and group of each node.

    Rows whose split is given have the number after the last node.
    """
    order = np.lexsort((rows.groups, rows.hashes))
    if rows.given.any():
        order = order[~np.repeat(rows.given, rows.sizes)[order]]
    node, new = np.empty(len(rows.hashes), np.int32), np.ones(len(order), bool)
    for low in range(1, len(order), _BLOCK):
        here = order[low : low + _BLOCK]
        before = order[low - 1 : low - 1 + len(here)]
        new[low : low + len(here)] = (rows.hashes[here] != rows.hashes[before]) | (rows.groups[here] != rows.groups[before])
    count = 0
    for low in range(0, len(order), _BLOCK):
        here = new[low : low + _BLOCK]
        node[order[low : low + _BLOCK]] = count - 1 + np.cumsum(here)
        count += int(here.sum())
    if rows.given.any():
        node[np.repeat(rows.given, rows.sizes)] = count
    order = order[new]
    return node, rows.hashes[order], rows.groups[order]


def _distinct(values: NDArray[np.uint64]) -> int:
    """How many different ones there are."""
    ordered = np.sort(values)
    return len(values) and 1 + int(np.count_nonzero(ordered[1:] != ordered[:-1]))


def name_of(identity: bytes) -> str:
    """An id as it is written: 32 hex digits."""
    return bytes(identity).ljust(_ID.itemsize, b"\0").hex()
