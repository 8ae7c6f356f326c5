"""The nodes that a run's clusters had, and what became of them: what the heads remember is kept in ``RUN/events/nodes/``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from jobs.clusters import AwayError, Cluster
from paris_ray.storage import Folder
from paris_ray.training.machines import kind


class Nodes:
    """Keeps them.

    Args:
        events: ``RUN/events``.
    """

    def __init__(self, events: Folder):
        self._folder = events / "nodes"
        self._kept: dict[str, dict[str, Any]] = {}

    def keep(self, clusters: Iterable[Cluster]) -> None:
        """Ask the clusters that answer, and write down what is new."""
        for cluster in clusters:
            if not cluster.answers:  # it is others who find out whether it does again
                continue
            with contextlib.suppress(AwayError, OSError):  # nothing depends on it; asked again
                name = cluster.name
                found = {one["node_id"]: describe(one) for one in cluster.call("list_nodes")}
                if name not in self._kept:
                    self._kept[name] = read(self._folder, name)  # a head that was started anew knows only its own
                if (now := {**self._kept[name], **found}) != self._kept[name]:
                    self._folder.write_json(f"{name}.json", now)
                    self._kept[name] = now


def read(folder: Folder, name: str) -> dict[str, dict[str, Any]]:
    """The nodes of a cluster by their ids: ``kind``, ``head``, ``from`` and ``until`` (unix time, ``None`` while it lives), ``why`` it ended."""
    try:
        return dict(folder.read_json(f"{name}.json"))
    except FileNotFoundError:
        return {}


def describe(node: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a node of Ray's state API."""
    dead, end = node["state"] == "DEAD", node.get("end_time_ms")
    return {
        "kind": kind({"Labels": node.get("labels") or {}, "Resources": node.get("resources_total") or {}}),
        "head": bool(node["is_head_node"]),
        "from": (node.get("start_time_ms") or 0) / 1000,
        "until": end / 1000 if dead and end else None,
        "why": (node.get("state_message") or "") if dead else "",
    }
