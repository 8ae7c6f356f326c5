"""A comparison's units, done by processes of this machine until all are, or time is up. The same call again goes on. No Ray; torch counts GPUs.

The corpus must be cut (``partitions/``): that is a job's, which has Ray.
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from typing import Any

import yaml

from paris_ray.config import ConfigError
from paris_ray.evaluation import compare_config
from paris_ray.evaluation.compare_config import CompareConfig
from paris_ray.evaluation.compare_plan import Plan, Unit
from paris_ray.evaluation.compare_workers import Workers, local_folder
from paris_ray.manifest import StaleError, differences, published
from paris_ray.progress import clock
from paris_ray.storage import Folder

CONFIG = "config.yaml"
FREE = ("rows", "routings", "workers", "folder")
"""Keys that may change from call to call: what is done stays."""

GROWING = ("learning_rates", "guidance_scales", "seeds")
"""Keys that may have more than before; of seeds the first one stays."""

SAY_SECONDS = 15.0

FLOPS_PER_SECOND = {"train": 3e10, "draw": 1.5e10, "losses": 1e10, "reference": 2e10, "captions": 2e10}
"""Of one process on one CPU core, until something has been measured."""


class UnitError(RuntimeError):
    """A unit failed; the message says which, and ends with its trace."""


def settle(compare: CompareConfig) -> None:
    """Write ``config.yaml`` into the comparison's folder; one that says something else is refused. Raises StaleError."""
    agree(compare)
    Folder(compare.folder).write_bytes(CONFIG, compare_config.dump(compare).encode())


def agree(compare: CompareConfig) -> None:
    """Refuse settings with which what is in the comparison's folder cannot have been made.

    Raises:
        StaleError: ``config.yaml`` there says something else.
    """
    folder = Folder(compare.folder)
    try:
        before = yaml.safe_load(folder.read_bytes(CONFIG))
    except FileNotFoundError:
        return
    now = yaml.safe_load(compare_config.dump(compare))
    grown = [key for key in GROWING if {*before.get(key, ())} <= {*now[key]} and (key != "seeds" or before[key][:1] == now[key][:1])]
    old, new = ({k: v for k, v in tree.items() if k not in (*FREE, *grown)} for tree in (before, now))
    changes = differences(old, new)
    if changes:
        listed = "\n".join(f"  - {change}" for change in changes[:20])
        raise StaleError(f"{folder.uri} holds a comparison with other settings:\n{listed}\nPut back what changed, or choose another folder.")


def count_workers(compare: CompareConfig) -> tuple[int, int]:
    """Processes to start, and GPUs to share among them."""
    import torch

    gpus = torch.cuda.device_count()
    if compare.base.expert.resources.gpus > 0 and not gpus:
        raise ConfigError(f"base.expert.resources.gpus is {compare.base.expert.resources.gpus:g}, but torch finds no GPU here; set it to 0")
    gpus = gpus if compare.base.expert.resources.gpus > 0 else 0
    return compare.workers or gpus or len(os.sched_getaffinity(0)), gpus


def run(compare: CompareConfig, seconds: float | None = None) -> bool:
    """Do units until all are done, or time is up.

    Args:
        compare: the comparison.
        seconds: after which to stop in order; what is half done goes on next time.

    Returns:
        whether all are done.

    Raises:
        UnitError: a unit failed.
        KeyboardInterrupt: as it came; the processes have gone in order.
    """
    plan, end = Plan(compare), None if seconds is None else time.monotonic() + seconds
    count, gpus = count_workers(compare)
    units = plan.units()
    if all(plan.done(unit.key) for unit in units):
        return True
    workers = Workers(count, compare.model_dump(mode="json"), local_folder(plan.folder, "logs"), gpus)
    line = Line(plan, count)
    try:
        while True:
            line.say(units, list(workers.busy.values()))
            if all(plan.done(unit.key) for unit in units):
                line.say(units, [], force=True)
                return True
            if end is not None and time.monotonic() > end:
                print("compare: time is up; the same command goes on", file=sys.stderr, flush=True)
                return False
            for unit in possible(plan, units, set(workers.busy.values()))[: len(workers.idle)] if workers.idle else []:
                assert unit.arguments is not None
                workers.give(workers.idle[0], unit.key, unit.kind, unit.arguments)
            if not workers.busy:
                raise UnitError("compare: nothing can be done, though not all is; " + ", ".join(u.key for u in units if not plan.done(u.key))[:400])
            ended = workers.wait(2.0)
            for one in ended:
                if one.error is not None:
                    raise UnitError(f"compare: {one.key} failed; done units are kept, and the same command tries it again:\n{one.error}")
            if ended:
                plan.forget()
                line.forget()
                units = plan.units()
    finally:
        workers.stop()


def possible(plan: Plan, units: list[Unit], busy: set[str]) -> list[Unit]:
    """Units that can be done now, the first to do first: what others wait for, and what takes long."""
    found = [
        unit
        for unit in units
        if unit.arguments is not None and unit.key not in busy and not plan.done(unit.key) and all(plan.done(need) for need in unit.needs)
    ]
    return sorted(found, key=lambda unit: (unit.phase, -unit.flops))


class Line:
    """How far it is, said now and then.

    Args:
        plan: of the comparison.
        workers: processes.
    """

    def __init__(self, plan: Plan, workers: int):
        self.plan, self.workers = plan, workers
        self._said = self._begun = time.monotonic()
        self._speed: dict[str, float] | None = None
        self._keys: set[str] = set()

    def forget(self) -> None:
        """Something has been measured since."""
        self._speed = None

    def speeds(self, units: list[Unit]) -> dict[str, float]:
        """Operations a second of one process, by kind of unit, from the manifests."""
        if self._speed is None:
            flops: dict[str, float] = defaultdict(float)
            seconds: dict[str, float] = defaultdict(float)
            for unit in units:
                if unit.flops and self.plan.done(unit.key) and (manifest := published(self.plan.folder / unit.key)) is not None:
                    flops[unit.kind] += unit.flops
                    seconds[unit.kind] += manifest["seconds"] or 0.0
            self._speed = {kind: flops[kind] / seconds[kind] if seconds[kind] else guess for kind, guess in FLOPS_PER_SECOND.items()}
        return self._speed

    def seconds(self, units: list[Unit]) -> tuple[float, float]:
        """Of one process: for what is done, and for what is to do."""
        speeds, done, left = self.speeds(units), 0.0, 0.0
        for unit in units:
            seconds = unit.flops / speeds[unit.kind]
            if self.plan.done(unit.key):
                done += seconds
            else:
                part = self._part(unit) if unit.kind == "train" and unit.arguments is not None else 0.0
                done, left = done + part * seconds, left + (1 - part) * seconds
        return done, left

    def _part(self, unit: Unit) -> float:
        """How much of a training is done, as its event says."""
        assert unit.arguments is not None
        run, stage = unit.arguments[:2]
        try:
            seen: dict[str, Any] = self.plan.runs_folder(run).read_json(f"events/{stage}.json")
        except (FileNotFoundError, ValueError):
            return 0.0
        return min(1.0, seen["done"] / seen["total"]) if seen.get("total") else 0.0

    def say(self, units: list[Unit], busy: list[str], force: bool = False) -> None:
        """Print the line, if it is time."""
        keys = {unit.key for unit in units if self.plan.done(unit.key)}
        fresh = sorted(keys - self._keys) if self._keys or force else []
        self._keys = keys
        if not force and not fresh and time.monotonic() - self._said < SAY_SECONDS:
            return
        self._said = time.monotonic()
        done, left = self.seconds(units)
        for key in fresh:
            manifest = published(self.plan.folder / key)
            took = f" in {clock(manifest['seconds'])}" if manifest and manifest["seconds"] else ""
            print(f"compare: {key} done{took}", file=sys.stderr, flush=True)
        now = f"; now {', '.join(busy)}" if busy else ""
        print(
            f"compare: {len(keys)} of {len(units)} units, {done / (done + left or 1):.0%} of the work, about {clock(left / self.workers)} to go{now}",
            file=sys.stderr,
            flush=True,
        )
