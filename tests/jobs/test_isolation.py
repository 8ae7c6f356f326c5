"""Isolation, to the bit: one expert of eight with the others in one cluster, alone in another, and beside one that is killed. Takes minutes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import psutil
import pytest

from jobs.local_cluster import LocalCluster
from paris_ray import config as configs
from paris_ray.config import RunConfig

PROJECT = Path(__file__).parent.parent.parent
LONG = {"images": 8000, "checkpoint_images": 800}

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]


def write_config(path: Path, run: Path) -> RunConfig:
    """Eight experts, of which one has two workers; 3 and 5 train longer."""
    experts = [{}, {"objective": "ddpm"}, {}, {"train": LONG}, {}, {"objective": "ddpm", "train": LONG}, {"resources": {"num_workers": 2}}, {}]
    tree = {"preset": "tiny", "run_dir": str(run), "experts": experts, "max_parallel": 3, "evaluation": {"control_router": False}}
    path.write_text(json.dumps(tree))
    return configs.load(str(path))


def workers(cluster: LocalCluster) -> dict[str, list[psutil.Process]]:
    """Training workers by Ray's id of their job."""
    found = defaultdict(list)
    for actor in cluster.request("/api/v0/actors?limit=10000", timeout=60.0)["data"]["result"]["result"]:
        if actor["class_name"] == "RayTrainWorker" and actor["state"] == "ALIVE":
            with contextlib.suppress(psutil.Error):  # it has just ended
                found[actor["job_id"]].append(psutil.Process(actor["pid"]))
    return found


def listeners(found: dict[str, list[psutil.Process]]) -> tuple[dict[int, str], list[tuple[str, int]]]:
    """Ports that workers listen on, by job, and where connections of workers lead, as the operating system sees them."""
    ports, leads = {}, []
    for job, processes in found.items():
        for process in processes:
            try:
                sockets = process.net_connections("inet")
            except psutil.Error:  # it has just ended
                continue
            ports |= {one.laddr.port: job for one in sockets if one.status == psutil.CONN_LISTEN}
            leads += [(job, one.raddr.port) for one in sockets if one.raddr]
    return ports, leads


def export(run: Path, k: int) -> bytes:
    return (run / "experts" / str(k) / "export" / "diffusion_pytorch_model.safetensors").read_bytes()


def train(cluster: LocalCluster, config: Path, run: Path, k: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jobs.train_expert", "--config", str(config), "--set", f"run_dir={run}", "--expert", str(k)]
    with open(run / f"log-{k}", "wb") as sink:
        return subprocess.Popen(command, cwd=PROJECT, env={**cluster.env(), "RAY_ADDRESS": cluster.gcs}, stdout=sink, stderr=sink)


def copied(run: Path, to: Path, *experts: int) -> Path:
    """What the experts need, and nothing else."""
    for part in ("encoders", *(f"shards/expert={k}" for k in experts)):
        shutil.copytree(run / part, to / part)
    return to


def test_an_expert_has_the_same_bits_in_any_company(tmp_path):
    run = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", run)
    with LocalCluster(run, num_cpus=4) as cluster:
        # (a) With the other seven.
        with open(tmp_path / "log", "wb") as sink:
            command = [sys.executable, "-m", "jobs.run_all", "--config", str(tmp_path / "run.yaml")]
            follower = subprocess.Popen(command, cwd=PROJECT, stdout=sink, stderr=sink)
        world: dict[str, int] = defaultdict(int)
        foreign, side_by_side, inside = [], 0, 0
        while follower.poll() is None:
            found = workers(cluster)
            ports, leads = listeners(found)
            for job, processes in found.items():
                world[job] = max(world[job], len(processes))
            side_by_side += len({*ports.values()}) > 1
            inside += any(ports.get(port) == job for job, port in leads)
            foreign += [(job, ports[port]) for job, port in leads if ports.get(port, job) != job]
            time.sleep(0.1)
        assert follower.returncode == 0, (tmp_path / "log").read_text()
        assert side_by_side > 20  # looks at several experts at once
        assert foreign == []
        assert inside  # the two workers of expert 6: such a connection would have been seen
        stage = {job["job_id"]: job["metadata"]["stage"] for job in cluster.request("/api/jobs/") if job["submission_id"]}
        asked = {f"expert-{k}": one.resources.num_workers for k, one in enumerate(config.experts)}
        assert {stage[job]: size for job, size in world.items()} == {**asked, "router": 1}

        # (c) With expert 5 killed twice beside it.
        beside = copied(run, tmp_path / "beside", 3, 5)
        both = {k: train(cluster, tmp_path / "run.yaml", beside, k) for k in (3, 5)}
        kills, last = 0, 0
        while any(process.poll() is None for process in both.values()):
            time.sleep(0.1)
            newest = max((int(one.parent.name[7:]) for one in (beside / "experts/5/checkpoints").glob("images-*/_manifest.json")), default=0)
            if kills < 2 and newest > last:
                drivers = {(job["driver_info"] or {}).get("pid"): job["job_id"] for job in cluster.request("/api/jobs/")}
                for process in workers(cluster).get(drivers[str(both[5].pid)], []):
                    os.kill(process.pid, signal.SIGKILL)
                    kills, last = kills + 1, newest
        for k, process in both.items():
            assert process.returncode == 0, (beside / f"log-{k}").read_text()
        restarts = {k: json.loads((beside / f"experts/{k}/_manifest.json").read_text())["counts"]["restarts"] for k in both}
        assert restarts == {3: 0, 5: 2}

    # (b) Alone in a second cluster.
    alone = copied(run, tmp_path / "alone", 3)
    with LocalCluster(tmp_path / "second", num_cpus=2) as second:
        process = train(second, tmp_path / "run.yaml", alone, 3)
        assert process.wait(300) == 0, (alone / "log-3").read_text()
    assert [one.name for one in (alone / "shards").iterdir()] == ["expert=3"]

    assert export(run, 3) == export(alone, 3) == export(beside, 3)
    assert export(run, 5) == export(beside, 5)
    assert export(run, 3) != export(run, 2)
