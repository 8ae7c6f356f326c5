"""What a comparison has measured so far: figures of each row and way to draw, their differences from the main row, losses. No torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_ray import rng
from paris_ray.evaluation import alignment_figures, compare_rows, matching
from paris_ray.evaluation.arrays import load
from paris_ray.evaluation.compare_config import CompareConfig
from paris_ray.evaluation.compare_plan import QUALITY, Plan, axes_for
from paris_ray.evaluation.compare_rows import MAIN, ROWS, Drawing, Run
from paris_ray.evaluation.distances import frechet, moments
from paris_ray.evaluation.intervals import Interval, bootstrap, bootstrap_paired, split_floor
from paris_ray.evaluation.scene_scorer import SCORES
from paris_ray.manifest import published
from paris_ray.storage import Folder

REPEATS_OF_SETS = 100
"""Bootstrap draws of a distance: each takes the roots of two matrices."""


@dataclass(frozen=True)
class Way:
    """One way to make pictures: a row, or another routing of one, under the seeds for which it is drawn.

    Attributes:
        key: the row, or ``ROW/ROUTING``.
        row: the row.
        drawing: how.
        folders: of the pictures, by seed.
    """

    key: str
    row: str
    drawing: Drawing
    folders: dict[int, Folder]


class Results:
    """Figures of a comparison, from its folder.

    Args:
        compare: the comparison.
    """

    def __init__(self, compare: CompareConfig):
        self.compare, self.plan = compare, Plan(compare)
        self.ways: dict[str, Way] = {}
        for row in compare.rows:
            rate, guidance = self.plan.rate(row), self.plan.guidance(row)
            if rate is None or guidance is None:
                continue
            own = self.plan.drawing(row, guidance)
            self._add(row, row, rate, own)
            for drawing in self.plan.variants(row, guidance, compare.seeds[0]):
                name = "more-steps" if row == "monolith" else drawing.routing
                self._add(f"{row}/{name}", row, rate, drawing)

    def _add(self, key: str, row: str, rate: float, drawing: Drawing) -> None:
        folders = {seed: Folder(Run(row, seed, rate).folder(self.compare)) / drawing.folder for seed in self.compare.seeds}
        there = {seed: folder for seed, folder in folders.items() if published(folder) is not None}
        if there:
            self.ways[key] = Way(key, row, drawing, there)

    def way(self, key: str) -> Way | None:
        """A way by its key; ``experts/top-2`` is the main row."""
        return self.ways.get(key) or (self.ways.get(MAIN) if key == f"{MAIN}/{compare_rows.routing(self.compare, MAIN)}" else None)

    # -- arrays -----------------------------------------------------------------------------------------------------------

    @functools.lru_cache(maxsize=512)  # noqa: B019, lives as long as the report is written
    def array(self, folder: Folder, name: str) -> NDArray[Any] | None:
        """An array of a unit, or ``None``."""
        return load(folder, name) if folder.exists(f"{name}.npy") else None

    def scores(self, way: Way, seeds: Sequence[int], name: str = QUALITY) -> NDArray[np.float64] | None:
        """A score of scenes, (N, R); ``None`` where pictures are no scenes."""
        found = [self.array(way.folders[seed], "scores") for seed in seeds]
        if any(one is None for one in found) or not found:
            return None
        return np.stack([one[:, SCORES.index(name)] for one in found if one is not None], 1)

    @functools.cached_property
    def reference(self) -> NDArray[np.float64] | None:
        """Features of the held-out originals along their principal axes, (M, A)."""
        found = self.array(Folder(self.compare.folder) / "reference", "held_out")
        return None if found is None else self._along(found)

    @functools.cached_property
    def _axes(self) -> NDArray[np.float64]:
        found = self.array(Folder(self.compare.folder) / "reference", "held_out")
        assert found is not None
        return np.asarray(np.linalg.eigh(moments(found)[1])[1][:, -axes_for(found) :])

    def _along(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        return np.asarray(features, np.float64) @ self._axes

    def features(self, way: Way, seeds: Sequence[int]) -> NDArray[np.float64] | None:
        """Of the judge, along the reference's axes, (N, R, A)."""
        if self.reference is None:
            return None
        found = [self.array(way.folders[seed], "features") for seed in seeds]
        if any(one is None for one in found) or not found:
            return None
        return np.stack([self._along(one) for one in found if one is not None], 1)

    def _distance(self, features: NDArray[np.float64]) -> float:
        """Fréchet distance of features (N, R, A) to the reference, the mean over seeds."""
        return float(np.mean([frechet(*self._moments, *moments(features[:, r])) for r in range(features.shape[1])]))

    @functools.cached_property
    def _moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        assert self.reference is not None
        return moments(self.reference)

    # -- figures ----------------------------------------------------------------------------------------------------------

    def quality(self, way: Way, name: str = QUALITY) -> Interval | None:
        """A score of scenes with its interval."""
        found = self.scores(way, sorted(way.folders), name)
        return None if found is None else bootstrap(found, self.compare.base.seed)

    def distance(self, way: Way) -> float | None:
        """Fréchet distance to the originals, lower is better: of as many captions for every way, as it falls with their number."""
        found = self.features(way, sorted(way.folders))
        return None if found is None else self._distance(found[: self.compare.routing_captions])

    def floor(self, count: int) -> Interval | None:
        """What so many of the originals themselves get."""
        if self.reference is None:
            return None
        statistic = lambda a, b: frechet(*moments(a), *moments(b))  # noqa: E731
        return split_floor(statistic, self.reference, self.compare.base.seed, rows=count)

    def difference(self, better: str, worse: str) -> Interval | None:
        """Of quality, first minus second, paired by caption and seed; by the score of scenes, else by distances."""
        return self.score_difference(better, worse) or self.distance_difference(better, worse)

    def _pair(self, better: str, worse: str) -> tuple[Way, Way, list[int]] | None:
        a, b = self.way(better), self.way(worse)
        if a is None or b is None:
            return None
        seeds = sorted(a.folders.keys() & b.folders.keys())
        return (a, b, seeds) if seeds else None

    def score_difference(self, better: str, worse: str, name: str = QUALITY) -> Interval | None:
        """Of a score of scenes."""
        if (pair := self._pair(better, worse)) is None:
            return None
        a, b = (self.scores(way, pair[2], name) for way in pair[:2])
        if a is None or b is None:
            return None
        n = min(len(a), len(b))  # fewer captions are the first of more
        return bootstrap_paired(a[:n], b[:n], self.compare.base.seed)

    def distance_difference(self, better: str, worse: str) -> Interval | None:
        """Of Fréchet distances, second minus first, so that above zero the first is better; captions and seeds are drawn anew together."""
        if (pair := self._pair(better, worse)) is None:
            return None
        a, b = (self.features(way, pair[2]) for way in pair[:2])
        if a is None or b is None:
            return None
        n, r = min(len(a), len(b)), a.shape[1]
        a, b = a[:n], b[:n]
        value, g, found = self._distance(b) - self._distance(a), rng.generator(self.compare.base.seed, "compare-distance", 0), []
        for _ in range(REPEATS_OF_SETS):
            rows, seeds = g.integers(n, size=n), g.integers(r, size=r)
            found.append(self._distance(b[rows][:, seeds]) - self._distance(a[rows][:, seeds]))
        # Rows drawn twice make distances larger: the spread is laid around the value itself.
        low, high = np.quantile(np.array(found) - np.mean(found), [0.025, 0.975])
        return Interval(value, value + float(low), value + float(high))

    def picture_flops(self, way: Way) -> float:
        """What a picture costs, with the experts that were asked."""
        counts = [(published(folder) or {})["counts"] for folder in way.folders.values()]
        run = self.plan.config(Run(way.row, self.compare.seeds[0], self.plan.rate(way.row) or 0.0))
        return float(
            np.mean(
                [
                    matching.picture_flops(
                        run, self.plan.inputs, way.drawing.routing, way.drawing.steps, way.drawing.guidance, count["asked"], count["visited"]
                    )
                    for count in counts
                ]
            )
        )

    # -- losses -----------------------------------------------------------------------------------------------------------

    def losses(self, row: str, name: str, seed: int | None = None) -> NDArray[Any] | None:
        """An array of the row's losses on held-out rows; see :func:`paris_ray.evaluation.compare_work.measure_losses`."""
        rate, seed = self.plan.rate(row), self.compare.seeds[0] if seed is None else seed
        if rate is None:
            return None
        folder = Folder(Run(row, seed, rate).folder(self.compare)) / "losses/held_out"
        return None if published(folder) is None else self.array(folder, name)

    def loss(self, row: str, name: str = "routed") -> NDArray[np.float64] | None:
        """Of each held-out row, the mean over times, (N, R) of the seeds that are there."""
        found = [self.losses(row, name, seed) for seed in self.compare.seeds]
        rows = [one.mean(0) for one in found if one is not None]
        return np.stack(rows, 1) if rows else None

    def loss_difference(self, better: str, worse: str) -> Interval | None:
        """Of losses, second minus first: above zero the first is better."""
        a, b = self.loss(better), self.loss(worse)
        if a is None or b is None:
            return None
        r = min(a.shape[1], b.shape[1])
        return bootstrap_paired(b[:, :r], a[:, :r], self.compare.base.seed)

    def faults(self) -> list[tuple[str, Interval | None, Interval | None]]:
        """Of each planted fault: by how much quality and loss are worse than the main row's."""
        return [(row, self.difference(MAIN, row), self.loss_difference(MAIN, row)) for row in self.compare.rows if ROWS[row].fault]

    def alignment(self, row: str = MAIN) -> alignment_figures.Alignment | None:
        """Experts and data of a row, over its seeds."""
        parts = []
        for seed in self.compare.seeds:
            names = ("experts", "router", "disagreement", "clusters", "routed")
            arrays = {name: one for name in names if (one := self.losses(row, name, seed)) is not None}
            if len(arrays) == len(names):
                parts.append(alignment_figures.measure(**arrays, ranks=self.losses(row, "ranks", seed)))
        return alignment_figures.together(parts, self.compare.base.seed) if parts else None
