"""Two real clusters side by side: experts of one run in both, stopped, killed and cut off in every way, and one model out with the bits of calm."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from jobs import cli
from jobs.head import free_ports
from jobs.local_cluster import LocalCluster
from paris_ray import config as configs
from paris_ray import stages
from paris_ray.inference.weights import load_model

PROJECT = Path(__file__).parent.parent.parent

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]

LONG = {"images": 40_000, "checkpoint_images": 4000}


def write_config(path: Path, run: Path, seen_there: Path, address: str, token_file: Path) -> Path:
    """Sizes and objectives mixed, two DDPM; experts 1 and 2 are in eu, where no node has the label that expert 2 wants first."""
    eu = {"address": address, "token_file": str(token_file), "storage": str(seen_there)}
    spot = {"labels": {"market": "spot"}, "wait_minutes": 0.05, "fallback": {"labels": {}}}
    experts = [
        {},
        {"objective": "ddpm", "train": {**LONG, "images": 24_000}, "cluster": "eu"},
        {"model": {"hidden_size": 48, "num_layers": 1, "num_heads": 4}, "cluster": "eu", "resources": spot},
        {"objective": "ddpm", "train": LONG},
    ]
    tree = {
        "preset": "tiny", "run_dir": str(run), "clusters": {"eu": eu}, "experts": experts, "max_parallel": 2,
        "expert": {"resources": {"price_per_hour": 1}}, "router": {"resources": {"price_per_hour": 0}},
        "evaluation": {"control_router": False},
    }  # fmt: skip
    path.write_text(json.dumps(tree))  # JSON is YAML
    return path


class Follower:
    """``run_all`` in a process of its own."""

    def __init__(self, config: Path, log: Path, *more: str):
        self.log = log
        with open(log, "wb") as sink:
            command = [sys.executable, "-m", "jobs.run_all", "--config", str(config), *more]
            self.process = subprocess.Popen(command, cwd=PROJECT, stdout=sink, stderr=sink)

    @property
    def text(self) -> str:
        return self.log.read_text()

    def until(self, condition: Callable[[], object], seconds: float = 600.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.text
            assert self.process.poll() is None, self.text
            time.sleep(0.2)

    def ends(self, code: int) -> None:
        assert self.process.wait(900) == code, self.text


def images(run: Path, stage: str) -> int:
    try:
        event = json.loads((run / "events" / f"{stage}.json").read_text())
    except (FileNotFoundError, ValueError):
        return 0
    return int(event["done"]) if event["state"] == "running" else 0


def checkpoints(run: Path, k: int) -> list[int]:
    return sorted(int(path.name.removeprefix("images-")) for path in (run / "experts" / str(k) / "checkpoints").glob("images-*"))


def jobs_of(cluster: LocalCluster) -> dict[str, str]:
    return {job["submission_id"]: job["status"] for job in cluster.request("/api/jobs/") if job["submission_id"]}


def stages_of(cluster: LocalCluster) -> set[str]:
    return {job["metadata"]["stage"] for job in cluster.request("/api/jobs/") if job["submission_id"]}


def weights(run: Path, k: int) -> bytes:
    return (run / "experts" / str(k) / "export" / "diffusion_pytorch_model.safetensors").read_bytes()


def command_lines() -> str:
    lines = []
    for process in psutil.process_iter():
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return "\n".join(lines)


def test_experts_of_two_clusters_are_one_model(tmp_path):
    run, there, calm, token_file = tmp_path / "run", tmp_path / "eu" / "store", tmp_path / "calm", tmp_path / "token"
    there.parent.mkdir()
    there.symlink_to(run)  # the same store under another name
    (port,) = free_ports(1)
    tokens = []

    def start_eu() -> LocalCluster:
        cluster = LocalCluster(tmp_path / "eu", num_cpus=2, port=port).start()
        tokens.append((cluster.temp_dir / "token").read_text())
        token_file.write_text(tokens[-1])
        return cluster

    with LocalCluster(run, num_cpus=2) as here:
        eu = start_eu()
        try:
            config = write_config(tmp_path / "mine.yaml", run, there, eu.address, token_file)
            follow(config, run, here, eu, start_eu)
            seen = command_lines()
        finally:
            if (left := LocalCluster.find(tmp_path / "eu")) is not None:
                left.stop()

        # One model, which loads and mixes both objectives.
        resolved = configs.load(str(run / "config.yaml"))
        for name in stages.names(resolved):
            assert stages.stage(resolved, name).status(verify=True).state == "valid"
        model = load_model(run / "model")
        for k in range(4):
            model.load_expert(k)

        # The same experts in one cluster, undisturbed and without a name of another: the same bytes.
        for part in ("encoders", "corpus", "clusters", "shards"):
            shutil.copytree(run / part, calm / part)
        env = {**here.env(), "RAY_ADDRESS": here.gcs}
        alone = []
        for k, machine in ((1, []), (2, ["--fallback"])):
            sets = [f"run_dir={calm}", "experts.1.cluster=here", "experts.2.cluster=here"]
            command = ["--config", str(config), *(word for one in sets for word in ("--set", one)), "--expert", str(k), *machine]
            alone.append(subprocess.Popen([sys.executable, "-m", "jobs.train_expert", *command], cwd=PROJECT, env=env))
        for k, process in zip((1, 2), alone, strict=True):
            assert process.wait(600) == 0
            assert weights(calm, k) == weights(run, k)

    # No token anywhere but in its file.
    written = "".join(path.read_text(errors="replace") for path in [*run.rglob("*"), *tmp_path.glob("log*")] if path.is_file())
    for token in tokens:
        assert token not in written + seen
    assert len(set(tokens)) == 2


def follow(config: Path, run: Path, here: LocalCluster, eu: LocalCluster, start_eu: Callable[[], LocalCluster]) -> None:
    """From the first command to the last."""
    folder, token_file, address = config.parent, config.parent / "token", eu.address

    # 1. A wrong token: said, with what to do, and nothing is started.
    right = token_file.read_text()
    token_file.write_text("wrong")
    refused = Follower(config, folder / "log1")
    refused.ends(2)
    assert f"clusters.eu.token_file: {address} refuses the token in {token_file}; put that cluster's own there" in refused.text
    assert jobs_of(here) == jobs_of(eu) == {}
    token_file.write_text(right)

    # 2. Too little money, once expert 0 is said to have cost much: what trains stops with a checkpoint. Expert 2 has waited for a label in vain.
    short = Follower(config, folder / "log2", "--max-cost", "100000")
    short.until(lambda: images(run, "expert-1") and images(run, "expert-3") and "expert-0: done" in short.text and "fallback" in short.text)
    (run / "events/machines/expert-0.json").write_text('{"hours": 60, "cost": 200000.0, "node": "dear"}')
    short.ends(cli.STOPPED)
    assert "and --max-cost is 100000" in short.text
    assert stages_of(eu) == {"expert-1", "expert-2"}
    assert not {"expert-1", "expert-2"} & stages_of(here)
    assert not {"PENDING", "RUNNING"} & {*jobs_of(here).values(), *jobs_of(eu).values()}
    assert "expert-2: no room for" in short.text
    assert "a worker asks for 1 CPU, label market=spot; the cluster has 1 × (2 CPU), free " in short.text
    assert "now its fallback: a worker asks for 1 CPU" in short.text
    for k in (1, 3):
        assert f"expert-{k}: stopped in order, with a checkpoint" in short.text
        assert 0 < max(checkpoints(run, k)) < 24_000

    # 3. More money goes on; the follower is killed in mid-run, the jobs of both clusters go on.
    second = Follower(config, folder / "log3", "--max-cost", "1e9")
    second.until(lambda: images(run, "expert-1") and images(run, "expert-3"))
    second.process.send_signal(signal.SIGKILL)
    second.process.wait()
    (one,) = (job for job, status in jobs_of(eu).items() if status == "RUNNING" and "-expert-1-" in job)
    (three,) = (job for job, status in jobs_of(here).items() if status == "RUNNING" and "-expert-3-" in job)

    # 4. The same command takes up both.
    third = Follower(config, folder / "log4", "--max-cost", "1e9")
    followed = (f"expert-1: already running as {one} in eu, following it", f"expert-3: already running as {three}, following it")
    third.until(lambda: all(line in third.text for line in followed))

    # 5. The head of eu dies, and is started anew, with another token: said, and all is done in the end.
    third.until(lambda: images(run, "expert-1"))
    os.kill(eu.state["pid"], signal.SIGKILL)
    eu.stop()
    third.until(lambda: "the cluster eu does not answer" in third.text)
    assert start_eu().address == address
    third.ends(0)
    assert "the cluster eu answers again, after" in third.text
    assert "the cluster eu no longer knows" in third.text
