"""What :mod:`jobs.doctor` knows and what it finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from paris_ray.config import RunConfig


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: the question.
        where: the node, cluster, file or store.
        value: what was found.
        state: ``ok``, ``fault``, or ``not asked``.
        rule: what it must be.
        remedy: what to do about it.
    """

    what: str
    where: str
    value: str
    state: str = "ok"
    rule: str = ""
    remedy: str = ""


def fault(what: str, where: str, value: str, rule: str, remedy: str) -> Finding:
    """Something that is wrong."""
    return Finding(what, where, value, "fault", rule, remedy)


@dataclass
class Facts:
    """All that is known.

    ``nodes``, ``dashboards``, ``scales`` (whether an autoscaler brings more nodes) and ``silent`` (why it told nothing) go by the name of a cluster,
    ``stores`` by who sees it: ``here`` or a node.
    """

    config: RunConfig | None = None
    address: str | None = None
    here: dict[str, Any] = field(default_factory=dict)
    nodes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    scales: dict[str, bool] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)
    stores: dict[str, dict[str, Any]] = field(default_factory=dict)
    token: dict[str, Any] | None = None
    token_files: dict[str, dict[str, Any]] = field(default_factory=dict)
    dashboards: dict[str, dict[str, Any]] = field(default_factory=dict)
    ports: list[dict[str, Any]] = field(default_factory=list)
    quotas: dict[str, Any] = field(default_factory=dict)

    def all_nodes(self) -> Iterator[dict[str, Any]]:
        """Every node that told; this machine where no cluster was asked."""
        every = [one for nodes in self.nodes.values() for one in nodes] or ([self.here] if self.here and self.address is None else [])
        return (one for one in every if "error" not in one)


def clouds(config: RunConfig | None) -> list[str]:
    """The clouds whose notices a run heeds."""
    if config is None:
        return []
    asked = [one.resources for one in (*config.experts, config.router)]
    return sorted({one.preemption for one in (*asked, *(r.fallback for r in asked if r.fallback)) if one.preemption is not None})


def asks_for_gpus(config: RunConfig | None) -> list[str]:
    """The parts of a run's config that train on GPUs."""
    if config is None:
        return []
    parts = [*((f"experts.{k}", one.resources) for k, one in enumerate(config.experts)), ("router", config.router.resources)]
    return [name for name, one in parts if one.gpus > 0]
