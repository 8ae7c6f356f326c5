"""What a comparison still has to do, and what it has chosen so far: a function of the config and of the files that are there. No torch, no Ray.

Rates and guidance are chosen on validation rows under the first seed, so later units appear once earlier ones are done. Nothing else is
remembered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from paris_ray import stages
from paris_ray.config import ConfigError, RunConfig
from paris_ray.evaluation import compare_rows, matching
from paris_ray.evaluation.arrays import load
from paris_ray.evaluation.compare_config import CompareConfig
from paris_ray.evaluation.compare_rows import MAIN, ROWS, Drawing, Run
from paris_ray.evaluation.distances import frechet_distance
from paris_ray.evaluation.scene_scorer import SCORES
from paris_ray.manifest import fingerprint, published
from paris_ray.storage import Folder
from paris_ray.training.budget import expert_flops

QUALITY = "objects"
"""The score of scenes that decides: the share of named things that are at their place."""

AXES = 64
"""Principal axes of the reference along which Fréchet distances are measured, at most."""

FAILED = "failed.json"
"""In a run's folder: its training came to no end, why."""


@dataclass(frozen=True)
class Unit:
    """One piece of work for one process.

    Attributes:
        key: what it is, for people, and where it is below the comparison's folder.
        kind: ``train``, ``losses``, ``draw`` or ``reference``.
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


def choose_rate(losses: Mapping[float, float]) -> float:
    """The learning rate with the least loss on validation rows; of equal ones the lower. A rate that diverged has the loss infinity.

    Raises:
        ConfigError: all diverged.
    """
    finite = {rate: loss for rate, loss in losses.items() if np.isfinite(loss)}
    if not finite:
        raise ConfigError(f"learning_rates: training diverged at all of {sorted(losses)}; give lower ones")
    return min(finite, key=lambda rate: (finite[rate], rate))


def choose_guidance(quality: Mapping[float, float]) -> float:
    """The guidance scale with the best quality (higher is better) on validation captions; of equal ones the lower, which is nearer to the data."""
    return max(quality, key=lambda scale: (quality[scale], -scale))


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
        self._chosen: dict[tuple[str, str], float] = {}

    # -- what is there ----------------------------------------------------------------------------------------------------

    def config(self, run: Run) -> RunConfig:
        """The config of a training; before the corpus is cut, with equal shares."""
        if run not in self._configs:
            partition = Folder(compare_rows.partition_config(self.compare, run.row).run_dir)
            made = published(partition / "clusters")
            self._configs[run] = compare_rows.run_config(self.compare, run, None if made is None else made["counts"]["sizes"])
        return self._configs[run]

    def done(self, key: str) -> bool:
        """Whether a unit has its manifest."""
        if key not in self._done and published(self.folder / key) is not None:
            self._done.add(key)
        return key in self._done

    def failed(self, run: Run) -> bool:
        """Whether a training came to no end."""
        return Folder(run.folder(self.compare)).exists(FAILED)

    def runs_folder(self, run: Run) -> Folder:
        """Where a training is."""
        return Folder(run.folder(self.compare))

    # -- choices ----------------------------------------------------------------------------------------------------------

    def validation_losses(self, row: str) -> dict[float, float]:
        """Loss on validation rows by learning rate, of those that have been measured."""
        found = {}
        for rate in self.compare.learning_rates:
            run = Run(row, self.compare.seeds[0], rate)
            if self.failed(run):
                found[rate] = float("inf")
            elif self.done(self._key(run, "losses/validation")):
                found[rate] = float(load(self.runs_folder(run) / "losses/validation", "routed").mean())
        return found

    def rate(self, row: str) -> float | None:
        """The row's learning rate, once it is chosen."""
        row = MAIN if ROWS[row].fault else row
        if ("rate", row) not in self._chosen:
            losses = self.validation_losses(row)
            if len(losses) < len(self.compare.learning_rates):
                return None
            self._chosen["rate", row] = choose_rate(losses)
        return self._chosen["rate", row]

    def guidance_qualities(self, row: str) -> dict[float, float]:
        """Quality on validation captions by guidance scale, of those that have been drawn."""
        rate = self.rate(row)
        if rate is None:
            return {}
        run, found = Run(row, self.compare.seeds[0], rate), {}
        for scale in self.compare.guidance_scales:
            drawing = self._trial(row, scale)
            if self.done(self._key(run, drawing.folder)):
                found[scale] = self.quality(self.runs_folder(run) / drawing.folder, "validation")
        return found

    def quality(self, drawing: Folder, split: str) -> float:
        """Of pictures, higher is better: of scenes the score :data:`QUALITY`, else the negative Fréchet distance."""
        if drawing.exists("scores.npy"):
            return float(load(drawing, "scores")[:, SCORES.index(QUALITY)].mean())
        reference = load(self.folder / "reference", split)
        return -frechet_distance(reference, load(drawing, "features"), axes_for(reference))

    def guidance(self, row: str) -> float | None:
        """The row's guidance scale, once it is chosen."""
        row = MAIN if ROWS[row].fault else row
        if ("guidance", row) not in self._chosen:
            found = self.guidance_qualities(row)
            if len(found) < len(self.compare.guidance_scales):
                return None
            self._chosen["guidance", row] = choose_guidance(found)
        return self._chosen["guidance", row]

    # -- drawings ---------------------------------------------------------------------------------------------------------

    def _trial(self, row: str, scale: float) -> Drawing:
        steps = self.compare.base.sampling.steps
        return Drawing("validation", compare_rows.routing(self.compare, row), scale, steps, self.compare.validation_captions)

    def drawing(self, row: str, guidance: float) -> Drawing:
        """What a row is judged by."""
        steps = self.compare.base.sampling.steps
        return Drawing("held_out", compare_rows.routing(self.compare, row), guidance, steps, self.compare.held_out_captions)

    def variants(self, row: str, guidance: float, seed: int) -> list[Drawing]:
        """Other ways to draw with the same weights: routings of the main row; of the monolith steps that cost what the main row's pictures do."""
        compare, own = self.compare, self.drawing(row, guidance)
        if row == MAIN:
            singles = [f"expert-{k}" for k in range(compare.base.num_experts)] if seed == compare.seeds[0] else []
            named = [text for routing in compare.routings for text in (singles if routing == "experts" else [routing])]
            return [Drawing("held_out", text, guidance, own.steps, compare.routing_captions) for text in named if text != own.routing]
        if row == "monolith":
            return [Drawing("held_out", own.routing, guidance, self.matched_steps(), compare.held_out_captions)]
        return []

    def matched_steps(self) -> int:
        """Steps with which a picture of the monolith costs what one of the main row does."""
        base, run = self.compare.base, self.config(Run("monolith", self.compare.seeds[0], self.compare.learning_rates[0]))
        wanted = matching.picture_flops(base, self.inputs, "top-2")
        return min(range(1, 1001), key=lambda steps: abs(matching.picture_flops(run, self.inputs, "expert-0", steps=steps) - wanted))

    # -- units ------------------------------------------------------------------------------------------------------------

    def units(self) -> list[Unit]:
        """All units, done ones too; those for which something must be chosen first cannot be done yet."""
        found = [Unit("reference", "reference", (), 1e12)]
        makers: dict[str, Run] = {}
        for row in self.compare.rows:
            found += self._row(row, makers)
        return found

    def _row(self, row: str, makers: dict[str, Run]) -> Iterator[Unit]:
        compare, first, fault = self.compare, self.compare.seeds[0], ROWS[row].fault
        rate, guidance = self.rate(row), self.guidance(row)
        if not fault:
            for trial in compare.learning_rates:
                run = Run(row, first, trial)
                if not self.failed(run):
                    yield from self._training(run, makers, 1, True)
                    yield self._losses(run, "validation", 1, True)
        for seed in compare.seeds:
            known = rate is not None
            run = Run(row, seed, compare.learning_rates[0] if rate is None else rate)
            if known and self.failed(run):
                continue  # the row has a seed less
            if seed != first or fault:
                yield from self._training(run, makers, 2, known)
            yield self._losses(run, "held_out", 3, known)
            if seed == first and not fault:
                for scale in compare.guidance_scales:
                    yield self._draw(run, self._trial(row, scale), 2, known)
            scale = compare.guidance_scales[0] if guidance is None else guidance
            for drawing in [self.drawing(row, scale), *self.variants(row, scale, seed)]:
                yield self._draw(run, drawing, 3, known and guidance is not None)

    def _key(self, run: Run, below: str) -> str:
        return f"runs/{run.row}/seed-{run.seed}-rate-{run.rate:g}/{below}"

    def _name(self, run: Run, below: str, known: bool) -> str:
        return self._key(run, below) if known else f"later: {run.row} seed-{run.seed} {below}"

    def _training(self, run: Run, makers: dict[str, Run], phase: int, known: bool) -> Iterator[Unit]:
        config, fault = self.config(run), ROWS[run.row].fault
        for stage in [*(stages.expert_name(k) for k in range(config.num_experts)), "router"]:
            below = f"experts/{stage.removeprefix('expert-')}" if stage != "router" else stage
            key = self._name(run, below, known)
            if stage == "router":
                flops = float(matching.router_training_flops(config, self.inputs))
            else:
                spec = config.experts[int(stage.removeprefix("expert-"))]
                flops = float((spec.train.images or 0) * matching.expert_training_flops(spec.model, self.inputs))
            if fault:
                source: Run | None = Run(MAIN, run.seed, run.rate)
            else:
                source = makers.setdefault(self._signature(run, config, stage), run)
            if source is None or source == run or (fault == "router" and stage == "router"):
                yield Unit(key, "train", (run, stage) if known else None, flops, (), phase)
                continue
            theirs = [self._key(source, below)] if not fault else [self._key(source, f"experts/{k}") for k in range(config.num_experts)]
            theirs += [self._key(source, "router")] if fault else []
            yield Unit(key, "train", (run, stage, source) if known else None, 0.0, tuple(theirs), phase)

    def _signature(self, run: Run, config: RunConfig, stage: str) -> str:
        """Stages with equal ones come to the same weights."""
        if (run, stage) not in self._signatures:
            start = None if stage == "router" else config.experts[int(stage.removeprefix("expert-"))].init_from
            found = [stages.config_part(config, stage), compare_rows.partition_name(self.compare, run.row), start]
            self._signatures[run, stage] = fingerprint(found)
        return self._signatures[run, stage]

    def _stages(self, run: Run) -> tuple[str, ...]:
        return (*(self._key(run, f"experts/{k}") for k in range(self.config(run).num_experts)), self._key(run, "router"))

    def _losses(self, run: Run, split: str, phase: int, known: bool) -> Unit:
        config, key = self.config(run), self._name(run, f"losses/{split}", known)
        asked = min(2, config.num_experts) + (config.num_experts if split == "held_out" else 0)
        flops = 6.0 * self.compare.loss_rows * asked * expert_flops(config.experts[0].model, self.inputs)
        needs = self._stages(run) if split == "validation" or run.seed != self.compare.seeds[0] or ROWS[run.row].fault else ()
        needs = needs or (self._key(run, "losses/validation"),)
        return Unit(key, "losses", (run, split) if known else None, flops, needs, phase)

    def _draw(self, run: Run, drawing: Drawing, phase: int, known: bool) -> Unit:
        config, key = self.config(run), self._name(run, drawing.folder, known)
        each = matching.picture_flops(config, self.inputs, drawing.routing, steps=drawing.steps, guidance=drawing.guidance)
        first = run.seed == self.compare.seeds[0] and not ROWS[run.row].fault
        needs = (self._key(run, f"losses/{'validation' if first else 'held_out'}"), "reference")
        return Unit(key, "draw", (run, drawing) if known else None, each * drawing.count, needs, phase)


def axes_for(reference: np.ndarray) -> int:
    """Principal axes along which a Fréchet distance to this reference is measured."""
    return min(AXES, reference.shape[1], len(reference) - 1)
