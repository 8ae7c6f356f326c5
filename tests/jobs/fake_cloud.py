"""A cloud on this machine, which Ray's autoscaler (v2) asks for nodes: each is a process that joins the cluster.

Runs in the processes of :class:`autoscaled_cluster.AutoscaledCluster`: as its head (``python fake_cloud.py HEAD.json``), as a node
(``python fake_cloud.py --node PARAMETERS``), and in the autoscaler, which imports :class:`Cloud`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import yaml
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_TYPE, FakeMultiNodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from jobs import head as jobs_head
from jobs.head import free_ports

HEAD = "head"


class Cloud(FakeMultiNodeProvider):
    """Ray's fake provider, whose nodes are processes of their own, vanish when they are killed, and of some types are never to be had."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str):
        super().__init__(provider_config, cluster_name)
        self.number = 0

    def _create_node_with_resources_and_labels(self, node_config, tags, count, resources, labels):
        kind = tags[TAG_RAY_USER_NODE_TYPE]
        if kind in self.provider_config["refuses"]:
            raise RuntimeError(f"InsufficientInstanceCapacity: there is no {kind}")
        with self.lock:
            self.number += 1
            name = f"{kind}-{self.number}"
            resources, folder = dict(resources), self.provider_config["folder"]
            params = {
                "gcs_address": self.provider_config["gcs_address"], "node_ip_address": "127.0.0.1", "node_name": name, "labels": dict(labels),
                "num_cpus": resources.pop("CPU", 0), "memory": resources.pop("memory", None), "resources": resources,
                "object_store_memory": 80 << 20, "node_manager_port": 0, "min_worker_port": 0, "max_worker_port": 0,
                "dashboard_agent_listen_port": None,
                # Of its own, as on another machine: what is logged there leaves it through its own log monitor alone.
                "temp_dir": f"{folder}/n{self.number}",
            }  # fmt: skip
            env = {**os.environ, "RAY_CLOUD_INSTANCE_ID": name, "RAY_NODE_TYPE_NAME": kind}
            with open(f"{folder}/{name}.log", "wb") as log:
                node = subprocess.Popen([sys.executable, __file__, "--node", json.dumps(params)], env=env, stdout=log, stderr=log)
            own = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_USER_NODE_TYPE: kind, TAG_RAY_NODE_NAME: name, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}
            self._nodes[name] = {"tags": {**own, **tags}, "node": node}

    def non_terminated_nodes(self, tag_filters):
        with self.lock:
            for name, one in list(self._nodes.items()):
                if name != HEAD and one["node"].poll() is not None:
                    del self._nodes[name]
        return super().non_terminated_nodes(tag_filters)

    def _terminate_node(self, node):
        node["node"].terminate()


def join(params: str) -> None:
    """A node, until it is terminated or one of its processes dies."""
    node = Node(RayParams(**json.loads(params)), head=False, shutdown_at_exit=True, spawn_reaper=True)
    while node.remaining_processes_alive():
        time.sleep(0.5)


def main(argv: list[str]) -> int:
    """The head, which has no CPU for tasks and an autoscaler."""
    with open(os.environ["FAKE_CLOUD"]) as file:
        cloud = json.load(file)
    folder = os.path.dirname(argv[0])
    (port,) = free_ports(1)
    types = {name: {"node_config": {}, "min_workers": 0, **one} for name, one in cloud["types"].items()}
    provider = {
        "type": "external", "module": "fake_cloud.Cloud", "head_node_id": HEAD, "launch_multiple": True, "disable_node_updaters": True,
        "gcs_address": f"127.0.0.1:{port}", "folder": folder, "refuses": cloud["refuses"],
    }  # fmt: skip
    head = {"resources": {}, "node_config": {}, "max_workers": 0}
    lists = ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands", "head_start_ray_commands",
             "worker_start_ray_commands", "cluster_synced_files")  # fmt: skip
    scaling = {
        "cluster_name": "fake", "provider": provider, "max_workers": 8, "idle_timeout_minutes": 1, "upscaling_speed": 1.0, "auth": {}, "docker": {},
        "file_mounts": {}, "head_node_type": FAKE_HEAD_NODE_TYPE, "available_node_types": {FAKE_HEAD_NODE_TYPE: head, **types},
        **{name: [] for name in lists},
    }  # fmt: skip
    path = f"{folder}/autoscaling.yaml"
    with open(path, "w") as file:
        yaml.safe_dump(scaling, file)
    return jobs_head.main(argv, num_cpus=0, gcs_server_port=port, no_monitor=False, autoscaling_config=path)


if __name__ == "__main__":
    if sys.argv[1] == "--node":
        join(sys.argv[2])
    else:
        sys.exit(main(sys.argv[1:]))
