"""Identity of a row, its split, and near-duplicates that change it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from paris_ray import rng
from paris_ray.config import SplitConfig
from paris_ray.data import schema
from paris_ray.storage import Folder

NEAR_DUPLICATES = "near_duplicates"
"""Stem of a file in ``RUN/corpus`` (each version has its own): rows that look like rows of another group, and the split that all of these have
(:mod:`paris_ray.data.duplicates`)."""


def row_id(content: str, caption: str) -> str:
    """Identity of a row: 32 hex digits of a hash of its content's hash (or its source's name for it) and its caption."""
    return hashlib.sha256(f"{content}\n{caption}".encode()).hexdigest()[:32]


def key_id(key: str) -> str:
    """Identity of a row that its source has a key for: 32 hex digits."""
    return hashlib.sha256(b"key\0" + key.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def split_of(split: SplitConfig, seed: int, group: str, identity: str, held_out: bool | None = None) -> str:
    """The split of a row, by hash alone, so that it is known before anything is fitted and stays when rows are added.

    Args:
        split: the shares.
        seed: the run's seed.
        group: rows of one group are held out together.
        identity: of what is drawn as one within a group: the row's id, or the group's where rows of a group look alike.
        held_out: whether the source holds the row out; ``None``: that is drawn. Whether another row is for validation is drawn in any case.
    """
    if held_out or (held_out is None and rng.key(seed, "split-group", group) < split.held_out_groups * 2**63):
        return "held_out"
    draw, rows = rng.key(seed, "split-row", identity) / 2**63, split.held_out_rows if held_out is None else 0.0
    if draw < rows:
        return "held_out"
    return "validation" if draw < rows + split.validation_rows else "train"


def read_each(corpus: Folder, columns: Sequence[str], parts: Collection[str] | None = None) -> Iterator[tuple[str, pa.Table, NDArray[np.int8]]]:
    """Some columns of each part file, and the split of each row: near-duplicates have the one that all of them have.

    Args:
        corpus: ``RUN/corpus``.
        columns: names.
        parts: names of part files; all by default.

    Yields:
        a file's name, its columns, and indices into :data:`paris_ray.data.schema.SPLITS`.
    """
    changed = _near_duplicates(corpus, ["part", "row", "split"])
    if changed is not None:
        number, rows, given = changed["part"].to_numpy(), changed["row"].to_numpy(), split_codes(changed["split"])
    for name, content, _ in schema.read_each(corpus, [*columns, "split"], parts):
        codes = split_codes(content["split"])
        if changed is not None:
            own = slice(*np.searchsorted(number, [schema.part_number(name), schema.part_number(name) + 1]))
            codes[rows[own]] = given[own]
        yield name, content.select(list(columns)), codes


def read_splits(corpus: Folder, parts: Collection[str] | None = None) -> dict[str, NDArray[np.int8]]:
    """The split of each row, by part file; arguments as in :func:`read_each`. A byte a row."""
    return {name: codes for name, _, codes in read_each(corpus, [], parts)}


def split_codes(column: pa.ChunkedArray) -> NDArray[np.int8]:
    """A column of splits as indices into :data:`paris_ray.data.schema.SPLITS`."""
    return np.asarray(pc.index_in(column, pa.array(schema.SPLITS)).to_numpy(), np.int8)


def read_copies(corpus: Folder) -> set[str]:
    """Ids of rows that look like a row of another group which stands for them all."""
    listed = _near_duplicates(corpus, ["id", "of"])
    return set() if listed is None else set(listed["id"].filter(pc.not_equal(listed["id"], listed["of"])).to_pylist())


def _near_duplicates(corpus: Folder, columns: Sequence[str]) -> pa.Table | None:
    names = schema.versions(corpus, NEAR_DUPLICATES)
    return schema.read_table(corpus, names[-1], columns) if names else None
