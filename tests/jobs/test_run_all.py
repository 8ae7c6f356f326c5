"""The whole pipeline on a real cluster: own jobs, skipped when done, picked up after being killed, the same bits in the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.local_cluster import LocalCluster
from paris_ray import config as configs
from paris_ray import stages

PROJECT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.timeout(1200)


def arguments(run: Path) -> list[str]:
    # Expert 0 trains long enough to be killed in the middle; the others as the preset says.
    sets = (f"run_dir={run}", "experts.0.train.images=9600", "experts.0.train.checkpoint_images=1600", "evaluation.control_router=false")
    return ["--config", "tiny", *(word for one in sets for word in ("--set", one))]


def start(run: Path, log: Path) -> subprocess.Popen[bytes]:
    # It finds the cluster of the test, and leaves it alone because its owner is alive.
    with open(log, "ab") as sink:
        return subprocess.Popen([sys.executable, "-m", "jobs.run_all", *arguments(run)], cwd=PROJECT, stdout=sink, stderr=sink)


def wait_for(condition: Any, process: subprocess.Popen[bytes], log: Path, seconds: float = 900.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)


def done_images(run: Path, stage: str) -> int:
    try:
        event = json.loads((run / "events" / f"{stage}.json").read_text())
    except (FileNotFoundError, ValueError):
        return 0
    return int(event["done"]) if event["state"] == "running" else 0


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def training_workers(cluster: LocalCluster) -> list[psutil.Process]:
    return [process for process in cluster.processes() if "RayTrainWorker" in title(process)]


def between(workers: list[psutil.Process]) -> list[tuple[int, int]] | None:
    """Connections from one training worker to another, as the operating system sees them; ``None`` unless two have their ports open."""
    try:
        sockets = {process.pid: process.net_connections("inet") for process in workers}
    except psutil.Error:  # one has just ended
        return None
    owner = {one.laddr.port: pid for pid, found in sockets.items() for one in found if one.status == psutil.CONN_LISTEN}
    if len(set(owner.values())) < 2:
        return None
    return [(pid, owner[one.raddr.port]) for pid, found in sockets.items() for one in found if one.raddr and owner.get(one.raddr.port, pid) != pid]


def weights(run: Path) -> bytes:
    return (run / "experts" / "0" / "export" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_killed_twice_it_ends_with_the_same_bits(tmp_path):
    run, calm, log = tmp_path / "run", tmp_path / "calm", tmp_path / "log"
    with LocalCluster(run) as cluster:
        # 1. The follower is killed in the middle of a training: its jobs go on.
        first = start(run, log)
        looks: list[list[tuple[int, int]] | None] = []
        wait_for(lambda: looks.append(between(training_workers(cluster))) or done_images(run, "expert-0") >= 1600, first, log)
        # Experts trained side by side, and no process of one talked to one of another.
        assert [] in looks
        assert not any(looks)
        first.kill()
        first.wait()
        before = {job["submission_id"] for job in cluster.request("/api/jobs/")}

        # 2. A training worker is killed, too: Ray Train starts another, which resumes from the checkpoint.
        victims = training_workers(cluster)
        assert victims
        for victim in victims:
            os.kill(victim.pid, signal.SIGKILL)

        # 3. The same command follows what runs and does the rest.
        second = start(run, log)
        assert second.wait(900) == 0, log.read_text()
        text = log.read_text()
        assert "expert-0: already running as" in text
        assert re.search(r"^tiny: \d+% of the .* of training were spent in steps \(goodput\)$", text, re.MULTILINE)
        jobs = {job["submission_id"]: job for job in cluster.request("/api/jobs/")}
        config = configs.load(str(run / "config.yaml"))
        assert before < set(jobs)
        for name in stages.names(config):
            assert stages.stage(config, name).status(verify=True).state == "valid"
            assert [one for one in jobs if one.endswith(f"-{name}-a1")], f"{name} was not a job of its own"
            assert (run / "events" / "logs" / f"{name}-a1.log").exists()
        assert len([one for one in jobs if "-expert-0-" in one]) == 1
        # A worker's lines reach the log once.
        said = [line for line in (run / "events/logs/expert-1-a1.log").read_text().splitlines() if re.search(r"expert-1: \d+ / \d+ images", line)]
        assert said
        assert len(said) == len(set(said))
        restarts = json.loads((run / "experts/0/_manifest.json").read_text())["counts"]["restarts"]
        assert restarts >= 1

        # 4. Undisturbed, in another place: the same weights, bit for bit.
        for part in ("encoders", "corpus", "clusters", "shards"):
            shutil.copytree(run / part, calm / part)
        env = {**cluster.env(), "RAY_ADDRESS": cluster.gcs}
        alone = [sys.executable, "-m", "jobs.train_expert", *arguments(calm), "--expert", "0"]
        subprocess.run(alone, cwd=PROJECT, env=env, check=True, timeout=600)
        assert weights(calm) == weights(run)

    # 5. All done: neither the cluster, which is gone, nor Ray is needed.
    began = time.monotonic()
    again = subprocess.run([sys.executable, "-m", "jobs.run_all", *arguments(run)], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stdout
    assert time.monotonic() - began < 20
    assert not (run / "cluster.json").exists()

    # 6. Another learning rate for one expert: refused, and nothing else is touched.
    changed = [*arguments(run), "--set", "experts.1.train.learning_rate=0.01"]
    refused = subprocess.run([sys.executable, "-m", "jobs.run_all", *changed], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "--rebuild expert-1" in refused.stderr
    assert configs.load(str(run / "config.yaml")) == config
