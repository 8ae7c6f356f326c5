"""What a comparison has measured so far: figures of each way to draw, their differences from the main row, losses. No torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_ray.data.scenes import UNSEEN
from paris_ray.evaluation import alignment_figures, compare_distances, compare_rows, matching
from paris_ray.evaluation.arrays import load
from paris_ray.evaluation.compare_captions import choose
from paris_ray.evaluation.compare_config import CompareConfig, InceptionJudge
from paris_ray.evaluation.compare_distances import Space
from paris_ray.evaluation.compare_plan import GRADED, QUALITY, Plan
from paris_ray.evaluation.compare_rows import MAIN, ROWS, Drawing, Run
from paris_ray.evaluation.intervals import Interval, mean_interval, paired_interval
from paris_ray.evaluation.scene_scorer import SCORES
from paris_ray.manifest import published
from paris_ray.storage import Folder

EQUAL_MONOLITHS = ("monolith", "monolith-steps")
"""Rows with an equal training; papers compare with the first, whose batch is that of all experts together."""

GROUNDED = "objects on the colour"
"""The score that sees what is new in every kind of unseen combination: the share of named things at their place, none on another colour."""


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

    Attributes:
        ways: by key, of captions like those of training.
        unseen: by key, of what the corpus holds out.
        made_otherwise: pictures that were made with other settings.
        originals: the manifest of what distances are measured to, once it is there.
    """

    def __init__(self, compare: CompareConfig):
        self.compare, self.plan = compare, Plan(compare)
        self.fid = isinstance(compare.judge, InceptionJudge)
        self.originals = published(self._originals)
        self.made_otherwise: list[str] = []
        self.ways: dict[str, Way] = {}
        self.unseen: dict[str, Way] = {}
        for row in compare.rows:
            for key in self.plan.ways(row, compare.seeds[0]):
                self._add(self.ways, key, "seen")
            self._add(self.unseen, row, "held_out")

    def _add(self, ways: dict[str, Way], key: str, part: str) -> None:
        row = key.partition("/")[0]
        rate, guidance = self.plan.rate(row), self.plan.guidance(key)
        drawing = None if guidance is None else self.plan.drawing(key, guidance, part)
        if rate is None or drawing is None:
            return
        folders = {seed: self.plan.runs_folder(self.plan.run(row, seed, rate)) / drawing.folder for seed in self.compare.seeds}
        made = {seed: manifest for seed, folder in folders.items() if (manifest := published(folder)) is not None}
        there = {seed: folders[seed] for seed, manifest in made.items() if self._as_asked(drawing, manifest)}
        self.made_otherwise += [f"{key} {part} seed {seed}" for seed in made if seed not in there]
        if there:
            ways[key] = Way(key, row, drawing, there)

    def _as_asked(self, drawing: Drawing, manifest: dict[str, Any]) -> bool:
        """Whether pictures are of this drawing, and judged as the originals were."""
        found = manifest["inputs"]["config"]
        wanted = drawing.as_json() | ({} if self.originals is None else {"judge": self.originals["inputs"]["config"]["judge"]})
        return {**found, **wanted} == found

    def way(self, key: str, unseen: bool = False) -> Way | None:
        """A way by its key, of captions like those of training or of unseen ones; ``ROW/top-2`` is the row, where it is drawn so."""
        row, _, routing = key.partition("/")
        ways = self.unseen if unseen else self.ways
        return ways.get(key) or (ways.get(row) if routing and routing == compare_rows.routing(self.compare, row) else None)

    @functools.cached_property
    def monolith(self) -> str | None:
        """Of the monoliths with an equal training the better one on validation captions; ``None`` before all of them have been measured."""
        chosen = {row: self.plan.guidance(row) for row in EQUAL_MONOLITHS if row in self.compare.rows}
        quality = {row: float(self.plan.guidance_qualities(row)[scale].mean()) for row, scale in chosen.items() if scale is not None}
        return max(quality, key=lambda row: quality[row]) if quality.keys() == chosen.keys() and quality else None

    def lost(self) -> list[str]:
        """Trainings that came to no end, at the row's own rate or another."""
        return [f"{row} seed {run.seed} rate {run.rate:g}" for row in self.compare.rows for run in self._runs(row) if self.plan.lost(run)]

    def left_out(self) -> list[str]:
        """Rows without any training, and what helps."""
        rates = ", ".join(f"{rate:g}" for rate in self.compare.learning_rates)
        said = f"came to no end at any of learning_rates, {rates}: add a lower one"
        rows = [row for row in self.compare.rows if self.plan.left_out(row)]
        needs = {row: ROWS[row].borrows or ROWS[row].student for row in rows if MAIN in rows}
        return [f"{row} needs the experts of {MAIN}, which {said}" if needs.get(row) else f"{row} {said}" for row in rows]

    def _runs(self, row: str) -> list[Run]:
        first, chosen = self.compare.seeds[0], self.plan.rate(row)
        runs = [] if ROWS[row].borrows else [self.plan.run(row, first, rate) for rate in self.plan.rates(row)]
        return runs + ([] if chosen is None else [run for seed in self.compare.seeds if (run := self.plan.run(row, seed, chosen)) not in runs])

    @property
    def independent(self) -> bool:
        """Whether distances are in the features of an encoder that did not make the clusters."""
        return self.originals is not None and bool(self.originals["counts"]["independent"])

    # -- arrays -----------------------------------------------------------------------------------------------------------

    @functools.lru_cache(maxsize=512)  # noqa: B019, lives as long as the report is written
    def array(self, folder: Folder, name: str) -> NDArray[Any] | None:
        """An array of a unit, or ``None``."""
        return load(folder, name) if folder.exists(f"{name}.npy") else None

    def scores(self, way: Way, seeds: Sequence[int], name: str = QUALITY) -> NDArray[np.float64] | None:
        """A score of scenes or :data:`GROUNDED`, (N, R); ``None`` where pictures are no scenes."""
        found = [self.array(way.folders[seed], "scores") for seed in seeds]
        if any(one is None for one in found) or not found:
            return None
        columns = [SCORES.index(one) for one in (("objects", "colour") if name == GROUNDED else (name,))]
        return np.stack([one[:, columns].prod(1) for one in found if one is not None], 1)

    @property
    def _originals(self) -> Folder:
        return Folder(self.compare.folder) / "reference"

    # -- spaces -----------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def space(self) -> Space | None:
        """In whose features distances are measured; ``None`` before there are originals."""
        found = self.array(self._originals, "validation")
        return None if found is None else Space(self.compare, found, compare_distances.own_originals(self.compare, self._run, len(found)))

    @functools.cached_property
    def pixels(self) -> Space | None:
        """Beside an encoder that made the clusters, and so is no independent judge: the pixels."""
        found = None if self.independent else self.array(self._originals, "validation")
        made = None if found is None else compare_distances.original_pixels(self.compare, self._run, len(found))
        return None if made is None else Space(self.compare, made, compare_distances.own_originals(self.compare, self._run, len(made)))

    @property
    def _run(self) -> Folder:
        return Folder(compare_rows.partition_config(self.compare, MAIN).run_dir)

    def _points(self, way: Way, seeds: Sequence[int], space: Space) -> list[NDArray[Any]] | None:
        """A way's pictures as points of a space, by seed."""
        name = "features" if space is self.space else "pictures"
        found = [one for seed in seeds if (one := self.array(way.folders[seed], name)) is not None]
        if len(found) < len(seeds) or not found:
            return None
        return found if space is self.space else [compare_distances.pixels(one) for one in found]

    # -- figures ----------------------------------------------------------------------------------------------------------

    def quality(self, way: Way, name: str = QUALITY, groups: NDArray[np.int64] | None = None) -> Interval | None:
        """A score of scenes with its interval."""
        found = self.scores(way, sorted(way.folders), name)
        return None if found is None else mean_interval(found, groups)

    def chance(self, way: Way, name: str = QUALITY) -> float | None:
        """What a way's pictures would score under shuffled captions, the mean over seeds."""
        counts = [(published(folder) or {}).get("counts", {}) for folder in way.folders.values()]
        return float(np.mean([count["chance"][name] for count in counts])) if all("chance" in count for count in counts) else None

    def ceiling(self, part: str, name: str = QUALITY) -> float | None:
        """What the originals score, as the codec gives them back."""
        found = self.array(self._originals, f"scores-{part}")
        return None if found is None else float(found[:, SCORES.index(name)].mean())

    def distance(self, way: Way, space: Space | None = None) -> float | None:
        """Fréchet distance to originals of other captions, lower is better, the mean over seeds: FID where the judge is Inception."""
        space = space or self.space
        found = None if space is None else self._points(way, sorted(way.folders), space)
        return None if space is None or found is None else space.distance(found)

    def kernel(self, way: Way) -> float | None:
        """KID where the judge is Inception; of features of another scale its kernel says nothing."""
        found = None if self.space is None or not self.fid else self._points(way, sorted(way.folders), self.space)
        return None if self.space is None or found is None else self.space.kernel(found)

    def value(self, key: str, name: str = QUALITY, unseen: bool = False) -> float | None:
        """A score of scenes, the mean over captions and seeds."""
        way = self.way(key, unseen)
        found = None if way is None else self.scores(way, sorted(way.folders), name)
        return None if found is None else float(found.mean())

    def difference(self, first: str, second: str, unseen: bool = False) -> Interval | None:
        """Of quality, first minus second, paired by caption and seed; by the score of scenes, else by distances of an independent judge."""
        scored = self.score_difference(first, second, unseen=unseen)
        return scored or (self.distance_difference(first, second) if self.independent and not unseen else None)

    def _pair(self, first: str, second: str, unseen: bool = False) -> tuple[Way, Way, list[int]] | None:
        a, b = self.way(first, unseen), self.way(second, unseen)
        if a is None or b is None:
            return None
        seeds = sorted(a.folders.keys() & b.folders.keys())
        return (a, b, seeds) if seeds else None

    def score_difference(self, first: str, second: str, name: str = "", unseen: bool = False) -> Interval | None:
        """Of a score of scenes: what is not named is :data:`QUALITY`, and of unseen combinations, of which equal ones count as one, GROUNDED."""
        if (pair := self._pair(first, second, unseen)) is None:
            return None
        a, b = (self.scores(way, pair[2], name or (GROUNDED if unseen else QUALITY)) for way in pair[:2])
        groups = self.unseen_groups() if unseen else None
        return None if a is None or b is None or (unseen and groups is None) else paired_interval(a, b, groups)

    def distance_difference(self, first: str, second: str, space: Space | None = None) -> Interval | None:
        """Of Fréchet distances, second minus first, so that above zero the first is better."""
        pair, space = self._pair(first, second), space or self.space
        if pair is None or space is None:
            return None
        a, b = (self._points(way, pair[2], space) for way in pair[:2])
        return None if a is None or b is None else space.difference(a, b)

    def above_chance(self, key: str, unseen: bool = False) -> bool:
        """Whether a way does better than its own pictures under shuffled captions, by its interval; true where there is no such score."""
        way = self.way(key, unseen)
        quality, chance = (None, None) if way is None else (self.quality(way, groups=self.unseen_groups() if unseen else None), self.chance(way))
        return quality is None or chance is None or quality.low > chance

    def unseen_differences(self, row: str, name: str = GROUNDED) -> list[Interval | None]:
        """Of a score on unseen combinations, the main row minus another: of all kinds, and of each of :data:`paris_ray.data.scenes.UNSEEN`.

        Captions with the same combination count as one.
        """
        groups = self.array(self._originals, "groups-held_out")
        a, b = self.unseen.get(MAIN), self.unseen.get(row)
        if groups is None or a is None or b is None or not (seeds := sorted(a.folders.keys() & b.folders.keys())):
            return [None] * (1 + len(UNSEEN))
        one, other = self.scores(a, seeds, name), self.scores(b, seeds, name)
        assert one is not None
        assert other is not None
        rows = [np.ones(len(groups), bool), *(groups[:, 1] == kind for kind in range(len(UNSEEN)))]
        return [paired_interval(one[own], other[own], groups[own, 0]) if own.any() else None for own in rows]

    def unseen_groups(self) -> NDArray[np.int64] | None:
        """Which combination each held-out caption has, (N,)."""
        found = self.array(self._originals, "groups-held_out")
        return None if found is None else found[:, 0]

    def picture_flops(self, way: Way) -> float:
        """What a picture costs, with the experts that were asked."""
        counts = [(published(folder) or {})["counts"] for folder in way.folders.values()]
        run = self.plan.config(self.plan.run(way.row, self.compare.seeds[0], self.plan.rate(way.row) or 0.0))
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

    def losses(self, row: str, name: str, seed: int) -> NDArray[Any] | None:
        """An array of the row's losses on rows that training did not see; see :func:`paris_ray.evaluation.compare_work.measure_losses`."""
        if (rate := self.plan.rate(row)) is None:
            return None
        folder = self.plan.runs_folder(self.plan.run(row, seed, rate)) / "losses/seen"
        return None if published(folder) is None else self.array(folder, name)

    def losses_by_seed(self, row: str, name: str = "routed") -> dict[int, NDArray[np.float64]]:
        """Of each row, the mean over times (N,), of the seeds that are there."""
        found = {seed: self.losses(row, name, seed) for seed in self.compare.seeds}
        return {seed: one.mean(0) for seed, one in found.items() if one is not None}

    def loss(self, row: str, name: str = "routed") -> float | None:
        """The mean over rows, times and seeds."""
        found = self.losses_by_seed(row, name)
        return float(np.mean([*found.values()])) if found else None

    def loss_difference(self, first: str, second: str) -> Interval | None:
        """Of losses, second minus first: above zero the first is better; paired by row and seed."""
        a, b = self.losses_by_seed(first), self.losses_by_seed(second)
        if not (seeds := sorted(a.keys() & b.keys())):
            return None
        stacked_b, stacked_a = (np.stack([one[seed] for seed in seeds], 1) for one in (b, a))
        return paired_interval(stacked_b, stacked_a)

    def faults(self) -> list[tuple[str, Interval | None, Interval | None]]:
        """Of each planted fault: by how much quality and loss are worse than the main row's."""
        return [(row, self.difference(MAIN, row), self.loss_difference(MAIN, row)) for row in self.compare.rows if ROWS[row].fault]

    def alignment(self, row: str = MAIN) -> alignment_figures.Alignment | None:
        """Experts and data of a row, over its seeds."""
        parts, clusters = [], None
        for seed in self.compare.seeds:
            experts, router = (self.losses(row, name, seed) for name in ("experts", "router"))
            if experts is not None and router is not None:
                parts.append(alignment_figures.measure(experts, router, self.losses(row, "ranks", seed)))
                clusters = self.losses(row, "clusters", seed)
        return None if clusters is None else alignment_figures.together(parts, clusters)

    def disagreement_in_pictures(self, row: str) -> Interval | None:
        """Whether pictures are worse where a row's experts disagree, by the mean of :data:`GRADED`; ``None``: not measured, or no scenes."""
        way = self.way(row)
        seeds = [] if way is None else [seed for seed in sorted(way.folders) if self.losses(row, "disagreement", seed) is not None]
        if way is None or not seeds or (things := self.losses(row, "things", seeds[0])) is None:
            return None
        graded = [one for name in GRADED if (one := self.scores(way, seeds, name)) is not None]
        run = Folder(compare_rows.partition_config(self.compare, MAIN).run_dir)
        if not graded or published(run / "corpus") is None:
            return None
        # Some rows of losses are those of pictures too, with the same noise.
        drawn = {one.id: i for i, one in enumerate(choose(self.compare, run, "seen", len(graded[0])))}
        both = [(i, drawn[one.id]) for i, one in enumerate(choose(self.compare, run, "losses", len(things))) if one.id in drawn]
        if not both:
            return None
        rows, pictures = (list(one) for one in zip(*both, strict=True))
        apart = np.stack([one.mean(0)[rows] for seed in seeds if (one := self.losses(row, "disagreement", seed)) is not None], 1)
        return alignment_figures.disagreement_in_pictures(apart, np.mean(graded, 0)[pictures], things[rows], self.compare.base.seed)
