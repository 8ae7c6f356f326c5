"""What a comparison still has to do, and what it has chosen so far: a function of the config and of the files that are there. No torch, no Ray.

Rates and guidance are chosen on validation rows under the first seed, guidance for each way to draw, so later units appear once earlier ones are
done. Nothing else is remembered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_ray import stages
from paris_ray.config import OpenClipEmbedding, RunConfig
from paris_ray.evaluation import compare_rows, matching
from paris_ray.evaluation.arrays import load
from paris_ray.evaluation.compare_config import CompareConfig, InceptionJudge
from paris_ray.evaluation.compare_rows import BLIND, MAIN, ROWS, Drawing, Run
from paris_ray.evaluation.distances import frechet_distance
from paris_ray.evaluation.scene_scorer import SCORES
from paris_ray.manifest import fingerprint, published
from paris_ray.storage import Folder
from paris_ray.training.budget import expert_flops

QUALITY = "all"
"""The score of scenes that decides: whether all that the caption says is there, and nothing else."""

GRADED = ("sizes", "colour", "texture", "clean")
"""Scores of scenes whose mean chooses guidance: what :data:`QUALITY` asks, with shades."""

AXES, FEW_AXES, FEW_PICTURES = 64, 16, 1000
"""Principal axes of the reference along which Fréchet distances are measured, at most; and of fewer pictures than so many."""

EXTRA_RATES = 2
"""While the best learning rate is at an end of those tried, the next one, twice or half, is tried as well, so often at most."""

MORE_STEPS = "more-steps"
"""The way of the monolith whose pictures cost what the main row's do."""

FAILED = "failed.json"
"""In a run's folder: its training came to no end, why."""


@dataclass(frozen=True)
class Unit:
    """One piece of work for one process.

    Attributes:
        key: what it is, for people, and where it is below the comparison's folder.
        kind: ``train``, ``losses``, ``draw``, ``reference`` or ``captions``.
        arguments: of the function in :data:`paris_ray.evaluation.compare_work.WORK`; ``None``: something must be chosen first.
        flops: what it is expected to cost, in operations.
        needs: keys of the units before it.
        phase: of those that can be done, the lowest goes first.
    """

    key: str
    kind: str
    arguments: tuple[Any, ...] | None
    flops: float
    needs: tuple[str, ...] = ()
    phase: int = 0


def choose_rate(losses: Mapping[float, float]) -> float | None:
    """The learning rate with the least loss on validation rows; of equal ones the lower. A rate that diverged has the loss infinity.

    ``None``: all diverged.
    """
    finite = {rate: loss for rate, loss in losses.items() if np.isfinite(loss)}
    return min(finite, key=lambda rate: (finite[rate], rate), default=None)


def choose_guidance(quality: Mapping[float, NDArray[np.float64]]) -> float:
    """The lowest guidance scale, which is nearest to the data, whose quality is within one standard error of the best.

    Args:
        quality: of each scale that of the same N captions, higher is better; of one number there is no error.
    """
    best = max(quality, key=lambda scale: (quality[scale].mean(), -scale))
    for scale in sorted(quality):
        lost = quality[best] - quality[scale]
        if lost.mean() <= (lost.std(ddof=1) / len(lost) ** 0.5 if len(lost) > 1 else 0.0):
            return scale
    return best


class Plan:
    """A comparison's units and choices, as its folder stands.

    Args:
        compare: the comparison; its corpus is cut already, or this is only to be printed.
    """

    def __init__(self, compare: CompareConfig):
        self.compare, self.folder = compare, Folder(compare.folder)
        self.inputs = matching.inputs_of(compare.base)
        self._configs: dict[Run, RunConfig] = {}
        self._signatures: dict[tuple[Run, str], str] = {}
        self._done: set[str] = set()
        self._undone: set[str] = set()
        self._chosen: dict[tuple[str, str], float] = {}
        self._losses_of: dict[Run, float] = {}

    def run(self, row: str, seed: int, rate: float) -> Run:
        """A training of a row; a student's teacher has the rate that is chosen for the main row."""
        return Run(row, seed, rate, self.rate(MAIN) if ROWS[row].student else None)

    # -- what is there ----------------------------------------------------------------------------------------------------

    def config(self, run: Run) -> RunConfig:
        """The config of a training; before the corpus is cut, with equal shares."""
        if run not in self._configs:
            partition = Folder(compare_rows.partition_config(self.compare, run.row).run_dir)
            made = published(partition / "clusters")
            self._configs[run] = compare_rows.run_config(self.compare, run, None if made is None else made["counts"]["sizes"])
        return self._configs[run]

    def done(self, key: str) -> bool:
        """Whether a unit has its manifest; what has none is asked again only after :meth:`forget`."""
        if key not in self._done and key not in self._undone:
            (self._undone if published(self.folder / key) is None else self._done).add(key)
        return key in self._done

    def forget(self) -> None:
        """Something may have been done since."""
        self._undone.clear()

    def failed(self, run: Run) -> bool:
        """Whether a training came to no end."""
        return Folder(run.folder(self.compare)).exists(FAILED)

    def runs_folder(self, run: Run) -> Folder:
        """Where a training is."""
        return Folder(run.folder(self.compare))

    # -- choices ----------------------------------------------------------------------------------------------------------

    def rates(self, row: str) -> list[float]:
        """Learning rates to try: the config's, and the next ones while the best of those measured is at an end."""
        found = sorted(self.compare.learning_rates)
        for _ in range(EXTRA_RATES if len(found) > 1 else 0):
            losses = self._losses_at(row, found)
            best = choose_rate(losses) if len(losses) == len(found) else None
            if best is None or best not in (found[0], found[-1]):
                break
            found = [best / 2, *found] if best == found[0] else [*found, best * 2]
        return found

    def validation_losses(self, row: str) -> dict[float, float]:
        """Loss on validation rows by learning rate, of those that have been measured."""
        return self._losses_at(row, self.rates(row))

    def _losses_at(self, row: str, rates: Sequence[float]) -> dict[float, float]:
        found = {}
        for rate in rates:
            run = self.run(row, self.compare.seeds[0], rate)
            if self.failed(run):
                found[rate] = float("inf")
            elif self.done(self._key(run, "losses/validation")):
                if run not in self._losses_of:
                    self._losses_of[run] = float(load(self.runs_folder(run) / "losses/validation", "routed").mean())
                found[rate] = self._losses_of[run]
        return found

    def rate(self, row: str) -> float | None:
        """The row's learning rate, once it is chosen; of a row that is left out there is none."""
        row = MAIN if ROWS[row].borrows else row
        if ("rate", row) not in self._chosen:
            losses = self.validation_losses(row)
            chosen = choose_rate(losses) if len(losses) == len(self.rates(row)) else None
            if chosen is None:
                return None
            self._chosen["rate", row] = chosen
        return self._chosen["rate", row]

    def left_out(self, row: str) -> bool:
        """Whether the row, or the main row whose experts it has or learns from, came to no end at any learning rate."""
        if all(self.failed(self.run(row, self.compare.seeds[0], rate)) for rate in self.compare.learning_rates):
            return True
        return (ROWS[row].borrows or ROWS[row].student) and self.left_out(MAIN)

    def lost(self, run: Run) -> bool:
        """Whether there are no pictures of a training: it, or the one whose experts it has or learns from, came to no end."""
        theirs = Run(MAIN, run.seed, run.rate) if ROWS[run.row].borrows else run.teacher
        return self.failed(run) or (theirs is not None and self.failed(theirs))

    def guidance_qualities(self, way: str) -> dict[float, NDArray[np.float64]]:
        """Quality on validation captions by guidance scale, of those that have been drawn."""
        row = way.partition("/")[0]
        rate = self.rate(row)
        if rate is None:
            return {}
        run, found = self.run(row, self.compare.seeds[0], rate), {}
        for scale in self.compare.guidance_scales:
            drawing = self.drawing(way, scale, "validation")
            if drawing is not None and self.done(self._key(run, drawing.folder)):
                found[scale] = self.quality(self.runs_folder(run) / drawing.folder)
        return found

    def quality(self, drawing: Folder) -> NDArray[np.float64]:
        """Of pictures of validation captions, higher is better: of scenes the mean of :data:`GRADED` (N,), else minus a Fréchet distance (1,)."""
        if drawing.exists("scores.npy"):
            return np.asarray(load(drawing, "scores")[:, [SCORES.index(name) for name in GRADED]].mean(1))
        reference, features = load(self.folder / "reference", "validation"), load(drawing, "features")
        return np.array([-frechet_distance(reference, features, axes_for(self.compare, reference, len(features)))])

    def guidance(self, way: str) -> float | None:
        """The guidance scale of a way, once it is chosen; faults have the main row's, single experts their row's."""
        row, _, name = way.partition("/")
        way = MAIN if ROWS[row].fault else row if name.startswith("expert-") else way
        if ("guidance", way) not in self._chosen:
            found = self.guidance_qualities(way)
            if len(found) < len(self.compare.guidance_scales):
                return None
            self._chosen["guidance", way] = choose_guidance(found)
        return self._chosen["guidance", way]

    # -- drawings ---------------------------------------------------------------------------------------------------------

    def ways(self, row: str, seed: int) -> list[str]:
        """Ways to draw with a row's weights under a seed: its own, ``ROW``, and others, ``ROW/ROUTING`` or ``monolith/more-steps``."""
        compare, own = self.compare, compare_rows.routing(self.compare, row)
        if row == MAIN:
            singles = [f"expert-{k}" for k in range(compare.base.num_experts)] if seed == compare.seeds[0] else []
            named = [text for routing in compare.routings for text in (singles if routing == "experts" else [routing])]
        elif row == BLIND:  # the oracle asks no router: it is the main row's
            named = [routing for routing in compare.routings if routing in ("top-1", "full")]
        else:
            named = [MORE_STEPS] if row == "monolith" and not self.left_out(MAIN) else []
        return [row, *(f"{row}/{text}" for text in named if text != own)]

    def drawing(self, way: str, guidance: float, part: str) -> Drawing | None:
        """Pictures of a way; ``None``: their steps depend on what is not chosen yet."""
        compare = self.compare
        row, _, name = way.partition("/")
        count = {"validation": compare.validation_captions, "seen": compare.seen_captions, "held_out": compare.held_out_captions}[part]
        routing, steps = name or compare_rows.routing(compare, row), compare.base.sampling.steps
        if name == MORE_STEPS:
            if (theirs := self.guidance(MAIN)) is None:
                return None
            routing, steps = compare_rows.routing(compare, row), self.matched_steps(theirs, guidance)
        return Drawing(part, routing, guidance, steps, count)

    def matched_steps(self, theirs: float, own: float) -> int:
        """Steps with which a picture of the monolith costs what one of the main row does.

        Args:
            theirs: the main row's guidance scale; without guidance a step costs half.
            own: the monolith's.
        """
        base, run = self.compare.base, self.config(Run("monolith", self.compare.seeds[0], self.compare.learning_rates[0]))
        wanted = matching.picture_flops(base, self.inputs, "top-2", guidance=theirs)
        one, two = (matching.picture_flops(run, self.inputs, "expert-0", steps=steps, guidance=own) for steps in (1, 2))
        return max(1, 1 + round((wanted - one) / (two - one)))

    # -- units ------------------------------------------------------------------------------------------------------------

    def units(self) -> list[Unit]:
        """All units, done ones too; those for which something must be chosen first cannot be done yet. A row that is left out has none."""
        found = [Unit("reference", "reference", (), 1e12)]
        if isinstance(self.compare.encoder, OpenClipEmbedding):
            found.append(Unit("captions", "captions", (), 1e12))
        makers: dict[str, Run] = {}
        for row in self.compare.rows:
            if not self.left_out(row):
                found += self._row(row, makers)
        return found

    def _row(self, row: str, makers: dict[str, Run]) -> Iterator[Unit]:
        compare, first, borrows = self.compare, self.compare.seeds[0], ROWS[row].borrows
        rate = self.rate(row)
        known = rate is not None
        for trial in [] if borrows else self.rates(row):
            run = self.run(row, first, trial)
            if not self.failed(run):
                yield from self._training(run, makers, 1, True)
                yield self._losses(run, "validation", 1, True)
        for seed in compare.seeds:
            run = self.run(row, seed, compare.learning_rates[0] if rate is None else rate)
            if known and self.lost(run):
                continue  # the row has a seed less
            if seed != first or borrows:
                yield from self._training(run, makers, 2, known)
            # A student waits until its teacher is put together.
            yield self._losses(run, "seen", 2 if row == MAIN else 3, known)
            for way in self.ways(row, seed):
                yield from self._way(run, way, known)

    def _way(self, run: Run, way: str, known: bool) -> Iterator[Unit]:
        chosen = self.guidance(way)
        if run.seed == self.compare.seeds[0] and not ROWS[run.row].fault and "/expert-" not in way:
            for scale in self.compare.guidance_scales:
                yield self._draw(run, way, scale, "validation", 2, known)
        scale = self.compare.guidance_scales[-1] if chosen is None else chosen
        for part in ("seen", "held_out") if way == run.row and self.compare.held_out_captions else ("seen",):
            yield self._draw(run, way, scale, part, 3, known and chosen is not None)

    def _key(self, run: Run, below: str) -> str:
        return f"{run.key}/{below}"

    def _name(self, run: Run, below: str, known: bool) -> str:
        return self._key(run, below) if known else f"later: {run.row} seed-{run.seed} {below}"

    def _arguments(self, run: Run, known: bool, *more: Any) -> tuple[Any, ...] | None:
        """Of a unit; none while its rate, or its teacher's, is not chosen."""
        return (run, *more) if known and (run.teacher is not None or not ROWS[run.row].student) else None

    def _training(self, run: Run, makers: dict[str, Run], phase: int, known: bool) -> Iterator[Unit]:
        config, fault = self.config(run), ROWS[run.row].fault
        for stage in [*(stages.expert_name(k) for k in range(config.num_experts)), "router"]:
            below = f"experts/{stage.removeprefix('expert-')}" if stage != "router" else stage
            key = self._name(run, below, known)
            if stage == "router":
                flops = float(matching.router_training_flops(config, self.inputs))
            else:
                spec = config.experts[int(stage.removeprefix("expert-"))]
                each = matching.expert_training_flops(spec.model, self.inputs) + compare_rows.teacher_flops(self.compare, run.row, self.inputs)
                flops = float((spec.train.images or 0) * each)
            if fault:
                source: Run | None = Run(MAIN, run.seed, run.rate)
            else:
                source = makers.setdefault(self._signature(run, config, stage), run)
            if source is None or source == run or (fault == "router" and stage == "router"):
                needs = () if stage == "router" or run.teacher is None else (self._put_together(run.teacher),)
                yield Unit(key, "train", self._arguments(run, known, stage), flops, needs, phase)
                continue
            theirs = [self._key(source, below)] if not fault else [self._key(source, f"experts/{k}") for k in range(config.num_experts)]
            theirs += [self._key(source, "router")] if fault else []
            yield Unit(key, "train", self._arguments(run, known, stage, source), 0.0, tuple(theirs), phase)

    def _signature(self, run: Run, config: RunConfig, stage: str) -> str:
        """Stages with equal ones come to the same weights."""
        if (run, stage) not in self._signatures:
            start = None if stage == "router" else config.experts[int(stage.removeprefix("expert-"))].init_from
            taught = None if stage == "router" else run.teacher_rate
            found = [stages.config_part(config, stage), compare_rows.partition_name(self.compare, run.row), start, taught]
            self._signatures[run, stage] = fingerprint(found)
        return self._signatures[run, stage]

    def _stages(self, run: Run) -> tuple[str, ...]:
        return (*(self._key(run, f"experts/{k}") for k in range(self.config(run).num_experts)), self._key(run, "router"))

    def _losses(self, run: Run, part: str, phase: int, known: bool) -> Unit:
        config, key = self.config(run), self._name(run, f"losses/{part}", known)
        asked = min(2, config.num_experts) + (config.num_experts if part == "seen" else 0)
        flops = 6.0 * self.compare.loss_rows * asked * expert_flops(config.experts[0].model, self.inputs)
        needs = self._stages(run) if part == "validation" or run.seed != self.compare.seeds[0] or ROWS[run.row].borrows else ()
        needs = needs or (self._key(run, "losses/validation"),)
        return Unit(key, "losses", self._arguments(run, known, part), flops, needs, phase)

    def _draw(self, run: Run, way: str, scale: float, part: str, phase: int, known: bool) -> Unit:
        drawing = self.drawing(way, scale, part)
        if drawing is None:
            known, drawing = False, Drawing(part, "expert-0", scale, self.matched_steps(scale, scale), self.compare.asked(part))
        config, name = self.config(run), way.partition("/")[2] or "own"
        key = self._key(run, drawing.folder) if known else f"later: {run.row} seed-{run.seed} {name} {part} {scale:g}"
        each = matching.picture_flops(config, self.inputs, drawing.routing, steps=drawing.steps, guidance=drawing.guidance)
        needs = (self._put_together(run), "reference")
        return Unit(key, "draw", self._arguments(run, known, drawing), each * drawing.count, needs, phase)

    def _put_together(self, run: Run) -> str:
        """Key of the unit that assembles a run's model before it measures."""
        first = run.seed == self.compare.seeds[0] and not ROWS[run.row].borrows
        return self._key(run, f"losses/{'validation' if first else 'seen'}")


def axes_for(compare: CompareConfig, reference: NDArray[np.floating], pictures: int) -> int:
    """Axes along which a Fréchet distance of so many pictures to this reference is measured: all of Inception's, which makes it FID."""
    if isinstance(compare.judge, InceptionJudge):
        return reference.shape[1]
    return min(AXES if pictures >= FEW_PICTURES else FEW_AXES, reference.shape[1], len(reference) - 1)
