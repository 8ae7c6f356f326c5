"""Which rows of the corpus a comparison asks, and with which noise: the same for every row of the table. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from paris_ray import rng
from paris_ray.config import ConfigError
from paris_ray.data.schema import SPLITS, read_columns, read_labels
from paris_ray.data.splits import read_copies, read_each, read_splits
from paris_ray.storage import Folder

if TYPE_CHECKING:
    from paris_ray.evaluation.compare_config import CompareConfig


@dataclass(frozen=True)
class Caption:
    """A row of the corpus to ask about: its caption, and the expert whose cluster it is in."""

    id: str
    caption: str
    cluster: int

    def noise(self, compare: CompareConfig, seed: int) -> int:
        """Seed of its picture's noise: of the comparison's seeds each has its own, and all rows of the table have the same."""
        return rng.key(compare.base.seed, "compare", self.id, seed) % 2**31


PARTS = ("validation", "losses", "seen", "held_out")
"""Validation rows by which rates and guidance are chosen; other validation rows, of which no choice is made, for losses; the same for pictures that
are judged, those first whose caption is not of the first kind either, though it may be that of a row of training (:func:`repeated`); and what the
corpus holds out."""


def choose(compare: CompareConfig, run: Folder, part: str, count: int | None) -> list[Caption]:
    """The first rows of a part by hash of their id, so that fewer are the first of more; copies of other rows are left out.

    Args:
        compare: the comparison.
        run: with ``corpus/`` and ``clusters/``.
        part: of :data:`PARTS`.
        count: how many; ``None``: all there are.

    Raises:
        ConfigError: there are not so many.
    """
    columns, splits = read_columns(run / "corpus", ["id", "caption"]), np.concatenate(list(read_splits(run / "corpus").values()))
    copies, labels = read_copies(run / "corpus"), read_labels(run / "clusters", ["id", "expert"])
    split = SPLITS.index("held_out" if part == "held_out" else "validation")
    rows = [row for row in np.flatnonzero(splits == split).tolist() if columns["id"][row] not in copies]
    ordered = sorted(rows, key=lambda row: rng.key(compare.base.seed, "compare", str(columns["id"][row])))
    chosen = ordered[compare.choice_rows if part in ("losses", "seen") else 0 :]
    if part == "seen":
        chosen_by = {columns["caption"][row] for row in ordered[: compare.choice_rows]}
        chosen.sort(key=lambda row: columns["caption"][row] in chosen_by)  # the order by hash stays within both
    if count is not None and count > len(chosen):
        raise ConfigError(
            f"{part}: {count} captions or rows are asked for (validation_captions, loss_rows, seen_captions, held_out_captions), but there are "
            f"{len(chosen)}; lower what is asked, or raise base.data.split.validation_rows or the rows that the source holds out"
        )
    ids = {str(columns["id"][row]) for row in chosen[:count]}
    clusters = {name: k for name, k in zip(labels["id"].to_pylist(), labels["expert"].to_pylist(), strict=True) if name in ids}
    return [Caption(name := str(columns["id"][row]), str(columns["caption"][row]), int(clusters[name])) for row in chosen[:count]]


def check(compare: CompareConfig, run: Folder) -> None:
    """Refuse a corpus with too few rows before anything is trained. Raises ConfigError."""
    for part in PARTS:
        choose(compare, run, part, compare.asked(part))


def repeated(compare: CompareConfig, run: Folder, part: str, count: int) -> dict[str, float]:
    """Of the first captions of a part, which share stands word for word in other rows as well, by what these are for.

    Args:
        compare: the comparison.
        run: with ``corpus/`` and ``clusters/``.
        part: of :data:`PARTS`.
        count: how many captions.

    Raises:
        ConfigError: there are not so many.
    """
    judged = [row.caption for row in choose(compare, run, part, count)]
    choices = [row.caption for row in choose(compare, run, "validation", compare.choice_rows)]
    trained: set[str] = set()
    for _, content, splits in read_each(run / "corpus", ["caption"]):  # of a large corpus no more is kept than the judged ones
        asked = pc.and_(pa.array(splits == SPLITS.index("train")), pc.is_in(content["caption"], pa.array(judged)))
        trained.update(content["caption"].filter(asked).to_pylist())
    others = {"train": trained, "choose guidance": {*choices[: compare.validation_captions]}, "choose the rate": {*choices[: compare.loss_rows]}}
    return {name: sum(caption in found for caption in judged) / len(judged) for name, found in others.items()}
