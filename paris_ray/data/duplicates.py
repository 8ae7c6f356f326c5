"""Rows that a finished corpus has twice: equal ones, of which one stays, and near-duplicates, which share one split. No Ray here.

Of each row the driver holds 33 bytes: id, perceptual hash, group and split.
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


@dataclass(slots=True)
class Rows:
    """What is held of each row of a corpus.

    Args:
        names: the part files.
        sizes: (P,) rows of each.
        ids: (N,) 16 bytes each.
        hashes: (N,) perceptual hashes.
        groups: (N,) hashes of the groups' names.
        splits: (N,) indices into ``SPLITS``, as drawn.
    """

    names: list[str]
    sizes: NDArray[np.int64]
    ids: NDArray[np.bytes_]
    hashes: NDArray[np.uint64]
    groups: NDArray[np.uint64]
    splits: NDArray[np.int8]

    def by_part(self, values: NDArray[np.generic]) -> dict[str, NDArray[np.generic]]:
        """An array over all rows, cut into those of each part."""
        return dict(zip(self.names, np.split(values, np.cumsum(self.sizes)[:-1]), strict=True))

    def keep(self, kept: NDArray[np.bool_]) -> Rows:
        """The rows that stay."""
        sizes = np.array([part.sum() for part in self.by_part(kept).values()], np.int64)
        return Rows(self.names, sizes, self.ids[kept], self.hashes[kept], self.groups[kept], self.splits[kept])


def read_rows(corpus: Folder) -> Rows:
    """Read what is needed of all rows, published or not."""
    pieces: list[tuple[str, NDArray[np.bytes_], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int8]]] = []
    for name, content, _ in schema.read_each(corpus, ["id", "phash", "group", "split"], schema.written(corpus)):
        ids = np.frombuffer(bytes.fromhex("".join(content["id"].to_pylist())), _ID)
        groups = np.array([_short(group) for group in content["group"].to_pylist()], np.uint64)
        pieces.append((name, ids, content["phash"].to_numpy().view(np.uint64), groups, split_codes(content["split"])))
    names, *columns = zip(*pieces, strict=True)
    sizes = np.array([len(ids) for ids in columns[0]], np.int64)
    return Rows(list(names), sizes, *(np.concatenate(column) for column in columns))


def _short(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def first_of_equals(ids: NDArray[np.bytes_]) -> NDArray[np.bool_]:
    """Which rows to keep so that each id is there once: the first with it."""
    order = np.argsort(ids, kind="stable")
    keep = np.ones(len(ids), bool)
    keep[order[1:]] = ids[order[1:]] != ids[order[:-1]]
    return keep


def drop(run: Folder, name: str, kept: NDArray[np.bool_]) -> None:
    """Move rows of a part to the rejects, as duplicates of rows that stay.

    The rejects come first: of a run that dies between the two files they are found again, and the rows are dropped then.
    """
    corpus, rejected = run / "corpus", run / "rejected"
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
    order = np.lexsort((rows.groups, rows.hashes))
    new = np.ones(len(order), bool)
    new[1:] = (rows.hashes[order[1:]] != rows.hashes[order[:-1]]) | (rows.groups[order[1:]] != rows.groups[order[:-1]])
    nodes = order[new]
    node = np.empty(len(order), np.int32)
    node[order] = np.cumsum(new) - 1
    component, unchecked = near_components(rows.hashes[nodes], rows.groups[nodes])
    shared = np.bincount(component, minlength=1)[component] > 1  # (nodes,)
    at = np.flatnonzero(shared[node])
    groups = len(np.unique(rows.groups))
    mine = component[node[at]]
    split, last = (np.full(len(component), none, np.int8) for none in (len(schema.SPLITS), -1))
    first = np.zeros(len(component), np.int64)
    old = at < settled
    np.minimum.at(split, mine[old], rows.splits[at[old]])
    np.maximum.at(last, mine[old], rows.splits[at[old]])
    split[last > split] = schema.SPLITS.index("unused")
    led = split[mine] < len(schema.SPLITS)
    np.minimum.at(split, mine[~led], rows.splits[at[~led]])
    chosen = np.where(old, rows.splits[at], split[mine])
    by_id = at[np.lexsort((rows.ids[at], ~old))]
    first[component[node[by_id[::-1]]]] = by_id[::-1]  # the last one written is the smallest id, of settled rows if there are any
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
                        "of": [name_of(one) for one in rows.ids[first[component[node[here]]]]],
                        "part": np.full(len(here), schema.part_number(name), np.int32),
                        "row": row.astype(np.int32),
                    },
                    NEAR,
                )
            )
    changed = int((chosen != rows.splits[at]).sum())
    rows.splits[at] = chosen
    return {"groups": groups, "near_duplicates": len(at), "split_changed": changed, "unchecked": unchecked}


def name_of(identity: bytes) -> str:
    """An id as it is written: 32 hex digits."""
    return bytes(identity).ljust(_ID.itemsize, b"\0").hex()
