"""Eight unlike experts on unlike machines: two sizes, two objectives, two types of GPU by name and by label, two clusters. One model, which serves.

Takes minutes.
"""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from jobs import serving
from jobs.local_cluster import LocalCluster
from paris_ray import config as configs
from paris_ray import stages
from serve_app import client

PROJECT = Path(__file__).parent.parent.parent
DDPM, ELSEWHERE = (1, 5), 6
NODES = {"A40": {"site": "lab"}, "T4": {"site": "office"}}
"""By its type of GPU, the labels of a node."""

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]


def place(k: int) -> dict[str, Any]:
    """What an expert asks for: a type of GPU, or a label."""
    if k == ELSEWHERE:
        return {}
    name = list(NODES)[k % 2]
    return {"accelerator_type": name} if k < 4 else {"labels": NODES[name]}


def write_config(folder: Path, eu: LocalCluster, models: list[dict[str, Any]], **more: Any) -> Path:
    """Expert k has the model k mod 3 of three, which are two sizes."""
    experts = [{"model": models[k % 3], "resources": place(k), **({"objective": "ddpm"} if k in DDPM else {})} for k in range(8)]
    experts[ELSEWHERE]["cluster"] = "eu"
    there = {"address": eu.address, "token_file": str(eu.temp_dir / "token")}
    tree = {
        "preset": "tiny", "run_dir": str(folder / "run"), "clusters": {"eu": there}, "experts": experts, "max_parallel": 3,
        "evaluation": {"control_router": False}, **more,
    }  # fmt: skip
    path = folder / "mine.yaml"
    path.write_text(json.dumps(tree))
    return path


JOIN = """
import json, sys, time
from ray._private.node import Node
from ray._private.parameter import RayParams
node = Node(RayParams(**json.loads(sys.argv[1])), head=False, shutdown_at_exit=True, spawn_reaper=True)
while node.remaining_processes_alive():
    time.sleep(1)
"""


def join(cluster: LocalCluster, gpu: str) -> subprocess.Popen[bytes]:
    """A node with two CPUs that says it has such a GPU, started as jobs/head.py does it. It ends with the cluster, whose mark it bears."""
    params = {
        "gcs_address": cluster.gcs, "node_ip_address": "127.0.0.1", "node_manager_port": 0, "min_worker_port": 0, "max_worker_port": 0, "num_cpus": 2,
        "resources": {f"accelerator_type:{gpu}": 1}, "labels": NODES[gpu], "object_store_memory": 128 << 20, "dashboard_agent_listen_port": None,
        "include_log_monitor": False, "temp_dir": str(cluster.temp_dir / "ray"),
    }  # fmt: skip
    with open(cluster.folder / f"node-{gpu}.log", "wb") as log:
        return subprocess.Popen([sys.executable, "-c", JOIN, json.dumps(params)], env=cluster._server_env(), stdout=log, stderr=log)


def nodes(cluster: LocalCluster) -> int:
    return sum(node["state"] == "ALIVE" for node in cluster.request("/api/v0/nodes")["data"]["result"]["result"])


def trained_and_served(folder: Path, models: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The whole of it; returns what was seen: seconds, bills, and pictures by routing."""
    run, began = folder / "run", time.monotonic()
    with LocalCluster(run, num_cpus=4) as here, LocalCluster(folder / "eu", num_cpus=2) as eu:
        for number, gpu in enumerate(NODES, 2):
            node = join(here, gpu)
            while nodes(here) < number:  # one after the other: two at once would take the same names for their sockets
                assert node.poll() is None, (run / f"node-{gpu}.log").read_text()
                time.sleep(0.5)
        config_file = write_config(folder, eu, models, **more)
        done = subprocess.run(
            [sys.executable, "-m", "jobs.run_all", "--config", str(config_file)], cwd=PROJECT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        trained = time.monotonic() - began
        assert {job["metadata"]["stage"] for job in eu.request("/api/jobs/") if job["submission_id"]} == {f"expert-{ELSEWHERE}"}

        config = configs.load(str(run / "config.yaml"))
        url = serving.deploy(here, config, serving.free_port("127.0.0.1", 0))
        serving.wait_ready(here, url)
        pictures, seconds = {}, {}
        for routing in ("top-1", "top-2", "threshold", "full", "caption", *(f"expert-{k}" for k in range(8))):
            before = time.monotonic()
            answer = client.generate(url, prompt="red apple", n=1, seed=0, routing=routing)
            seconds[routing] = time.monotonic() - before
            assert answer["degraded"] == []
            pictures[routing] = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))))
        assert httpx.get(f"{url}/health/ready").status_code == 200
    for name in stages.names(config):
        assert stages.stage(config, name).status(verify=True).state == "valid"
    bills = {k: json.loads((run / f"events/machines/expert-{k}.json").read_text()) for k in range(8)}
    counts = {k: json.loads((run / f"experts/{k}/_manifest.json").read_text())["counts"] for k in range(8)}
    return {"log": done.stdout, "trained": trained, "bills": bills, "counts": counts, "seconds": seconds, "pictures": pictures}


SMALL, LARGE = {"hidden_size": 32, "num_layers": 2, "num_heads": 2}, {"hidden_size": 48, "num_layers": 1, "num_heads": 4}
LONG = {"images": 1600, "checkpoint_images": 800}  # long enough that its machine is seen
SHORT = {"images": 32, "batch_size": 4, "micro_batch": 4, "checkpoint_images": 32, "log_images": 16}  # B/2 makes one image a second here


@pytest.mark.parametrize(
    ("models", "widths", "train", "more"),
    [((SMALL, LARGE), (32, 48), LONG, {}), (({"size": "S/2"}, {"size": "B/2"}), (384, 768), SHORT, {"max_parallel": 1})],
    ids=["small", "S/2 and B/2"],
)
def test_unlike_experts_on_unlike_machines_are_one_model_that_serves(tmp_path, models, widths, train, more):
    small, large = models
    seen = trained_and_served(tmp_path, [small, large, small], expert={"train": train}, **more)
    exported = [json.loads((tmp_path / f"run/model/expert_{k}/config.json").read_text()) for k in range(8)]
    assert [one["objective"] for one in exported] == ["ddpm" if k in DDPM else "flow" for k in range(8)]
    assert [one["hidden_size"] for one in exported] == [widths[k % 3 == 1] for k in range(8)]
    # Each was where it asked to be.
    asked = {k: list(NODES)[k % 2] for k in range(8) if k != ELSEWHERE}
    assert {k: bill["node"] for k, bill in seen["bills"].items() if k != ELSEWHERE} == asked
    assert seen["bills"][ELSEWHERE]["node"] == "2 CPU"
    for routing, picture in seen["pictures"].items():
        assert picture.shape == (32, 32, 3), routing
        assert picture.std() > 0, routing
    alone = [seen["pictures"][f"expert-{k}"].tobytes() for k in range(8)]
    assert len(set(alone)) == 8
    assert seen["pictures"]["full"].tobytes() not in alone
