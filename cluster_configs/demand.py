"""Whether a cluster's node types have what a run asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from paris_ray.config import RunConfig
from paris_ray.resources import HERE, Machine, in_words

UNITS = 10_000
"""In one of a resource; Ray's amounts are whole numbers of these."""


@dataclass(frozen=True)
class Demand:
    """What one part of a run asks of a node for each of its workers.

    Attributes:
        name: the key of the config that says so.
        resources: as Ray counts them.
        labels: label selectors.
        workers: how many at least at once.
        preemption: whose notices it heeds.
    """

    name: str
    resources: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)
    workers: int = 1
    preemption: str | None = None

    def __str__(self) -> str:
        types = [name.partition(":")[2] for name in self.resources if name.startswith("accelerator_type:")]
        amounts = {name: amount for name, amount in self.resources.items() if not name.startswith("accelerator_type:")}
        return in_words(amounts, next(iter(types), None), self.labels)


def demands(config: RunConfig, cluster: str = HERE) -> Iterator[Demand]:
    """What a run asks of one of its clusters: experts that train there, and in the cluster where all else runs, encoders, clustering and routers."""
    if cluster == HERE:
        yield Demand("data.encoder_cpus and encoder_gpus", {"CPU": config.data.encoder_cpus, "GPU": config.data.encoder_gpus})
    yield from trainings(config, cluster)


def trainings(config: RunConfig, cluster: str = HERE) -> Iterator[Demand]:
    """What the trainings of a run ask of one of its clusters."""
    for k, expert in enumerate(config.experts):
        if expert.cluster == cluster:
            yield from _trainings(f"experts.{k}.resources", expert.resources, expert.resources.num_workers)
    if cluster == HERE:
        yield from _trainings("router.resources", config.router.resources, config.router.resources.num_workers)


def _trainings(name: str, asked: Machine, workers: int) -> Iterator[Demand]:
    resources = {"CPU": asked.cpus, "GPU": asked.gpus, **asked.custom}
    if asked.accelerator_type:
        resources[f"accelerator_type:{asked.accelerator_type}"] = 0.001  # what Ray makes of it
    yield Demand(name, resources, asked.labels, workers, asked.preemption)
    fallback = getattr(asked, "fallback", None)
    if fallback is not None:
        yield from _trainings(f"{name}.fallback", fallback, workers)


def selects(selector: str, value: str | None) -> bool:
    """Whether a selector of Ray's, ``x``, ``!x``, ``in(x, y)`` or ``!in(x, y)``, takes a label's value, ``None`` where a node has no such label."""
    wanted = selector.removeprefix("!")
    found = re.fullmatch(r"in\((.*)\)", wanted)
    any_of = [one.strip() for one in found[1].split(",")] if found else [wanted]
    return (value in any_of) != selector.startswith("!")


def fits(demand: Demand, node_type: dict[str, Any]) -> int:
    """How many workers of it fit on a node of such a type."""
    labels = node_type.get("labels", {})
    if not all(selects(selector, labels.get(key)) for key, selector in demand.labels.items()):
        return 0
    asked = {name: amount for name, amount in demand.resources.items() if amount > 0}
    return min((times(name, node_type["resources"].get(name, 0), amount) for name, amount in asked.items()), default=1)


def times(name: str, has: float, amount: float) -> int:
    """How often a machine has an amount of a resource, as Ray counts: in ten-thousandths, and no part of a GPU on two of them."""
    if name == "GPU" and amount < 1:
        return int(has) * times("part", 1, amount)
    return round(has * UNITS) // max(1, round(amount * UNITS))


def unmet(demand: Demand, node_types: dict[str, dict[str, Any]]) -> str | None:
    """Why no node type can take a demand, ``None`` if one can."""
    most = {name: fits(demand, one) * one["max_workers"] for name, one in node_types.items()}
    if max(most.values(), default=0) >= demand.workers:
        return None
    could = [name for name, one in node_types.items() if fits(demand, one)]
    if not could:
        return f"{demand.name} asks for {demand}, which no node type has"
    bounds = ", ".join(f"{name}.max_workers is {node_types[name]['max_workers']}" for name in could)
    return f"{demand.name} asks for {demand} for {demand.workers} worker{'s' * (demand.workers > 1)} at once, but {bounds}"
