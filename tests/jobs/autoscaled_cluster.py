"""A local cluster that begins as a head without a CPU, and whose nodes an autoscaler starts and ends as they are asked for."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from jobs.head import free_ports
from jobs.local_cluster import LocalCluster

HERE = Path(__file__).parent
NODE_TYPES = HERE / "node_types.yaml"


class AutoscaledCluster(LocalCluster):
    """On loopback only, with token authentication; ended by its mark, nodes included.

    Args:
        folder: of the run.
        refuses: types of nodes that are never to be had.
        types: a YAML file of node types.
    """

    head = (str(HERE / "fake_cloud.py"),)

    def __init__(self, folder: str | os.PathLike[str], refuses: Sequence[str] = (), types: Path = NODE_TYPES):
        super().__init__(folder, object_store_bytes=100 << 20)
        self.cloud = {"types": yaml.safe_load(types.read_text()), "refuses": list(refuses)}

    def start(self) -> LocalCluster:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "cloud.json").write_text(json.dumps(self.cloud))
        return super().start()

    def _server_env(self) -> dict[str, str]:
        env = super()._server_env()
        return {
            **env,
            "FAKE_CLOUD": str(self.folder / "cloud.json"),
            "PYTHONPATH": os.pathsep.join([str(HERE), env["PYTHONPATH"]]),
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": "head",
            "RAY_NODE_TYPE_NAME": "ray.head.default",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "AUTOSCALER_METRIC_PORT": str(free_ports(1)[0]),
        }

    def nodes(self) -> list[dict[str, Any]]:
        """All nodes that there are or were, as Ray's state API tells of them."""
        return list(self.request("/api/v0/nodes?detail=1", timeout=60)["data"]["result"]["result"])

    def workers(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Nodes beside the head, of a type if one is named."""
        found = [one for one in self.nodes() if one["state"] == "ALIVE" and not one["is_head_node"]]
        return [one for one in found if kind in (None, one["labels"].get("ray.io/node-group"))]

    def raylet(self, node_id: str) -> psutil.Process:
        """The process whose death is a node's."""
        for one in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if one.name() == "raylet" and node_id in " ".join(one.cmdline()):
                    return one
        raise AssertionError(f"no raylet of the node {node_id} runs")
