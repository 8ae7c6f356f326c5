"""A run on a cluster that begins as a head alone: nodes of the kinds that its experts ask for come, die, are refused, and go again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from autoscaled_cluster import AutoscaledCluster

from jobs import clusters, status, timeline
from jobs.head import free_ports
from jobs.nodes import Nodes, read
from jobs.serving import answers
from paris_ray import config as configs
from paris_ray import stages
from paris_ray.inference.weights import load_model
from paris_ray.storage import Folder
from paris_ray.training import machines

sys.path.insert(0, str(Path(__file__).parents[1] / "serve_app"))

from served_model import write_model

PROJECT = Path(__file__).parent.parent.parent

LONG = {"images": 28_800, "checkpoint_images": 1600}  # still training when what is asked before its node dies has been answered
FALLBACK = {"accelerator_type": "A100", "labels": {"market": "on-demand"}}
EXPERTS = [
    {"resources": {"labels": {"market": "spot"}, "accelerator_type": "A100"}, "train": LONG},
    {"resources": {"custom": {"lab": 1}}, "objective": "ddpm"},
    # Never to be had here.
    {"resources": {"accelerator_type": "H100", "wait_minutes": 0.5, "fallback": FALLBACK}},
]
ROUTER = {"resources": {"labels": {"purpose": "data"}}}
KINDS = {"expert-0": "a100-spot", "expert-1": "t4-lab", "expert-2": "a100-on-demand", "router": "cpu"}
REFUSED = "h100"


def wait(condition: Any, seconds: float = 300.0, why: Any = lambda: "it did not happen") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.2)


TASK = """
import ray
ray.init(logging_level=30)
@ray.remote(num_cpus=1, label_selector={"market": "on-demand"})
def where():
    return ray.get_runtime_context().get_node_id()
print(ray.get(where.remote()))
ray.util.placement_group([{"CPU": 1, "accelerator_type:H100": 0.001}])
nowhere = ray.util.placement_group([{"CPU": 1000}])
import sys, time
from paris_ray.training.machines import _see, scaler
began = time.time()
while "could not start h100, 3 times" not in (said := scaler(_see()[3], [nowhere.id.hex()], began)) or "knows no kind" not in said:
    assert time.time() < began + 40, said
    time.sleep(0.3)
print(said)
"""


@pytest.mark.timeout(300)
def test_nodes_come_by_label_are_refused_and_go(tmp_path):
    """What an autoscaler says is read from a real one."""
    with AutoscaledCluster(tmp_path, refuses=[REFUSED]) as cluster:
        assert [one["resources_total"].get("CPU") for one in cluster.nodes()] == [None]  # the head, which has none for tasks
        env = {**cluster.env(), "RAY_ADDRESS": cluster.gcs, "RAY_SCHEDULER_EVENTS": "0"}
        done = subprocess.run([sys.executable, "-c", TASK], env=env, capture_output=True, text=True, cwd=PROJECT, check=False)
        assert done.returncode == 0, done.stderr
        where, said = done.stdout.splitlines()
        assert [one["node_id"] for one in cluster.nodes() if one["labels"].get("ray.io/node-group") == "a100-on-demand"] == [where]
        assert "InsufficientInstanceCapacity" in "".join(log.read_text() for log in cluster.temp_dir.glob("ray/session_latest/logs/monitor.log"))
        assert "the autoscaler" in said
        wait(lambda: not cluster.workers(), 60)
        (gone,) = (one for one in cluster.nodes() if one["node_id"] == where)
        assert not timeline.died(gone["state_message"])


def write_config(path: Path, run: Path) -> Path:
    tree = {"preset": "tiny", "run_dir": str(run), "experts": EXPERTS, "router": ROUTER, "evaluation": {"control_router": False}}
    path.write_text(json.dumps(tree))
    return path


def event(run: Path, stage: str) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return machines.event(Folder(str(run)) / "events", stage)
    return {"state": "", "done": 0, "message": ""}


@pytest.mark.chaos
@pytest.mark.timeout(1500)
def test_a_run_brings_up_its_nodes_loses_one_and_lets_them_go(tmp_path, capsys):
    run, log = tmp_path / "run", tmp_path / "log"
    with AutoscaledCluster(run, refuses=[REFUSED]) as cluster, contextlib.ExitStack() as ended:
        config_file = write_config(tmp_path / "mine.yaml", run)
        with open(log, "wb") as sink:
            follower = subprocess.Popen([sys.executable, "-m", "jobs.run_all", "--config", str(config_file)], cwd=PROJECT, stdout=sink, stderr=sink)
        ended.callback(follower.kill)

        def until(condition: Any) -> None:
            def going() -> Any:
                assert follower.poll() is None, log.read_text()
                return condition()

            wait(going, 900, log.read_text)

        # Expert 2 waits in vain: said at once, with what the autoscaler reports, and its fallback comes.
        until(lambda: "could not start h100" in event(run, "expert-2")["message"])
        assert status.main(["--config", str(run / "config.yaml")]) == 0
        lines = capsys.readouterr().out.splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith("expert-2"))
        assert lines[at].split()[1] in ("starting", machines.QUEUED)
        asks = r"(waits for machines|no room) for \d+ s: a worker asks for 1 CPU, H100; the cluster has"
        report = r"could not start h100, \d+ times? so far"
        assert re.match(f" +{asks} .*; the autoscaler .*{report}", lines[at + 1]), lines[at + 1]

        # The node of expert 0 dies in mid-training.
        until(lambda: event(run, "expert-0")["done"] >= 3200 and event(run, "expert-0")["state"] == "running")
        (victim,) = machines.bill(Folder(str(run)) / "events", "expert-0")["spans"][-1]["ids"]
        os.kill(cluster.raylet(victim).pid, signal.SIGKILL)
        seen = event(run, "expert-0")["done"]
        assert follower.wait(900) == 0, log.read_text()
        text = log.read_text()
        assert "expert-2: no room for" in text
        assert "now its fallback: a worker asks for 1 CPU, A100, label market=on-demand" in text

        # All is done, on the kinds of nodes that were asked for.
        config = configs.load(str(run / "config.yaml"))
        for name in stages.names(config):
            assert stages.stage(config, name).status(verify=True).state == "valid"
        model = load_model(run / "model")
        for k in range(3):
            model.load_expert(k)
        bills = {name: machines.bill(Folder(str(run)) / "events", name) for name in KINDS}
        assert {name: bill["node"] for name, bill in bills.items()} == KINDS
        held = [one["ids"] for one in bills["expert-0"]["spans"] if one["ids"]]
        assert len(held) >= 2
        assert held[0] == [victim] != held[-1]
        assert json.loads((run / "experts/0/_manifest.json").read_text())["counts"]["restarts"] >= 1
        # What the dead node's worker had said is in the run, to the end of its steps.
        spoken = [int(done) for done in re.findall(r"expert-0: (\d+) / 28800 images", (run / "events/logs/expert-0-a1.log").read_text())]
        assert any(0 < done <= seen for done in spoken)

        # The cluster is a head again.
        wait(lambda: not cluster.workers(), 120, lambda: str(cluster.workers()))
        Nodes(Folder(str(run)) / "events").keep([clusters.here(config, cluster)])
    kept = read(Folder(str(run)) / "events" / "nodes", "here")
    assert all(one["until"] for one in kept.values() if not one["head"])
    assert Counter(one["kind"] for one in kept.values())["a100-spot"] >= 2
    assert REFUSED not in {one["kind"] for one in kept.values()}
    assert [name for name, one in kept.items() if one["until"] and timeline.died(one["why"])] == [victim]
    picture = Path(os.environ.get("PARIS_TIMELINE", tmp_path / "timeline.svg"))
    assert timeline.main(["--config", str(run / "config.yaml"), "--svg", str(picture)]) == 0
    out = capsys.readouterr().out
    print(out)
    assert out.count("died:") == 1
    assert picture.read_text().count("✕") == 2  # and in the legend


SCALE = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1, "upscale_delay_s": 2, "downscale_delay_s": 5, "look_back_period_s": 5}


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_busy_group_of_experts_gets_nodes_and_gives_them_back(tmp_path):
    """Group 1 may have two replicas, each of which needs a node of its own."""
    write_model(tmp_path / "model")
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    plain = {"purpose": "data"}
    placement = [{"experts": [0, 2], "labels": plain}, {"experts": [1], "replicas": [1, 2], "labels": {"market": "spot"}}]
    # The others are elsewhere, so that the spot nodes are the busy group's.
    others = [{"name": name, "ray_actor_options": {"num_cpus": cpus, "label_selector": plain}} for name, cpus in (("Sampler", 0.5), ("Api", 0.1))]
    application = {
        "name": "paris", "route_prefix": "/", "import_path": "serve_app.app:build",
        "args": {"model": str(tmp_path / "model"), "placement": placement, "cpus": 1, "sampler_cpus": 0.5},
        "deployments": [*others, {"name": "ExpertGroup-1", "autoscaling_config": SCALE}],
    }  # fmt: skip
    with AutoscaledCluster(tmp_path / "run") as cluster:
        body = {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
        cluster.request("/api/serve/applications/", body, method="PUT", timeout=120.0)

        def replicas() -> int:
            found = cluster.request("/api/serve/applications/", timeout=60)["applications"]["paris"]["deployments"]["ExpertGroup-1"]["replicas"]
            return sum(one["state"] == "RUNNING" for one in found)

        wait(lambda: answers(f"{url}/health/ready"), 400)
        assert replicas() == len(cluster.workers("a100-spot")) == 1
        body = {"prompt": "red apple", "n": 8, "num_inference_steps": 50, "routing": "full"}
        asking = [subprocess.Popen([sys.executable, "-c", ASK, url, json.dumps(body)]) for _ in range(2)]
        try:
            wait(lambda: replicas() == len(cluster.workers("a100-spot")) == 2, 200)
        finally:
            for one in asking:
                one.terminate()
                one.wait()
        wait(lambda: replicas() == len(cluster.workers("a100-spot")) == 1, 200)
        answer = httpx.post(f"{url}/v1/images/generations", json={**body, "n": 1, "num_inference_steps": 2}, timeout=60)
        assert (answer.status_code, answer.json()["degraded"]) == (200, [])


ASK = """
import json, sys, httpx
while True:
    httpx.post(f"{sys.argv[1]}/v1/images/generations", json=json.loads(sys.argv[2]), timeout=120)
"""
