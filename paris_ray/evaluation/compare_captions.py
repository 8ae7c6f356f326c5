"""Which rows of the corpus a comparison asks, and with which noise: the same for every row of the table. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from paris_ray import rng
from paris_ray.data.schema import SPLITS, read_columns, read_labels
from paris_ray.data.splits import read_copies, read_splits
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


def choose(compare: CompareConfig, run: Folder, split: str, count: int) -> list[Caption]:
    """The first rows of a split by hash of their id, so that fewer are the first of more; copies of other rows are left out.

    Args:
        compare: the comparison.
        run: with ``corpus/`` and ``clusters/``.
        split: ``validation`` or ``held_out``.
        count: how many, or all there are.
    """
    columns, splits = read_columns(run / "corpus", ["id", "caption"]), np.concatenate(list(read_splits(run / "corpus").values()))
    copies, labels = read_copies(run / "corpus"), read_labels(run / "clusters", ["id", "expert"])
    rows = [row for row in np.flatnonzero(splits == SPLITS.index(split)).tolist() if columns["id"][row] not in copies]
    chosen = sorted(rows, key=lambda row: rng.key(compare.base.seed, "compare", str(columns["id"][row])))[:count]
    ids = {str(columns["id"][row]) for row in chosen}
    clusters = {name: k for name, k in zip(labels["id"].to_pylist(), labels["expert"].to_pylist(), strict=True) if name in ids}
    return [Caption(name := str(columns["id"][row]), str(columns["caption"][row]), int(clusters[name])) for row in chosen]
