"""A training on a cluster of which any part is killed with signal 9, and the same command that goes on each time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
from ray.cluster_utils import Cluster

from paris_ray.config import RunConfig
from paris_ray.storage import Folder
from paris_ray.training import checkpoint

PROJECT = Path(__file__).parent.parent.parent
KINDS = ("worker", "controller", "driver", "node")


@dataclass
class Kill:
    """One death.

    Attributes:
        kind: one of KINDS; a node dies with its raylet.
        seconds: after the first checkpoint since the death before; ``None``: while the checkpoint after that one is being written.
        unfinished: whether it left a checkpoint without its manifest.
    """

    kind: str
    seconds: float | None
    unfinished: bool = False


class Ground:
    """A head without room for a training worker and a node with room for one, for trainings that are commands of their own."""

    def __init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.cluster.add_node(num_cpus=1)

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()

    def start(self, config: RunConfig, k: int, log: Path) -> subprocess.Popen[bytes]:
        """Train an expert, or go on with it, by the command that a job has."""
        command = [sys.executable, "-m", "jobs.train_expert", "--config", f"{config.run_dir}/config.yaml", "--expert", str(k)]
        env = {**os.environ, "RAY_ADDRESS": self.cluster.address, "PYTHONPATH": str(PROJECT)}
        with open(log, "ab") as sink:
            return subprocess.Popen(command, cwd=PROJECT, env=env, stdout=sink, stderr=sink)

    def kill(self, kind: str, driver: subprocess.Popen[bytes]) -> bool:
        """Whether there was something of the kind to kill."""
        if kind == "driver":
            driver.kill()
            driver.wait()
            return True
        victims = processes("TrainController" if kind == "controller" else "RayTrainWorker")
        if not victims:
            return False
        if kind != "node":
            for victim in victims:
                os.kill(victim.pid, signal.SIGKILL)
            return True
        (node,) = self.cluster.worker_nodes
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        self.cluster.remove_node(node, allow_graceful=False)  # what is left of it
        self.cluster.add_node(num_cpus=1)  # another machine, as an autoscaler would start it
        return True


def processes(title: str) -> list[psutil.Process]:
    """Below this one, by what Ray calls them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def checkpoints(stage: Folder, finished: bool) -> list[int]:
    """Images of the checkpoints that have their manifests, or of those that have not."""
    root = stage / "checkpoints"
    return [int(name.removeprefix("images-")) for name in root.folders() if root.exists(f"{name}/_manifest.json") == finished]


def train(ground: Ground, config: RunConfig, k: int, kills: list[Kill], log: Path) -> int:
    """Train to the end under all deaths, with the same command after each that ended it; returns how often that was started."""
    stage, starts = Folder(config.run_dir) / "experts" / str(k), 1
    driver = ground.start(config, k, log)

    def alive() -> None:
        nonlocal driver, starts
        if driver.poll() is not None:
            assert driver.returncode != 0, f"it is done before its end was disturbed as planned\n{log.read_text()}"
            driver, starts = ground.start(config, k, log), starts + 1

    def unfinished() -> bool:
        return any(images > done for images in checkpoints(stage, finished=False))

    def newest(beyond: int) -> int:
        deadline = time.monotonic() + 240
        while (found := max(checkpoints(stage, finished=True), default=0)) <= beyond:
            assert time.monotonic() < deadline, log.read_text()
            alive()
            time.sleep(0.01)
        return found

    try:
        done = 0
        for kill in kills:
            done = newest(done)
            if kill.seconds is None:
                while not unfinished():
                    assert driver.poll() is None, log.read_text()
            else:
                time.sleep(kill.seconds)
            while not ground.kill(kill.kind, driver):
                alive()
                time.sleep(0.05)
            kill.unfinished = unfinished()
            print(f"{kill.kind} killed after image {done}, {'a checkpoint half written' if kill.unfinished else 'between checkpoints'}", flush=True)
        deadline = time.monotonic() + 240
        while driver.poll() is None or driver.returncode != 0:
            assert time.monotonic() < deadline, log.read_text()
            if driver.poll() is not None:
                driver, starts = ground.start(config, k, log), starts + 1
            time.sleep(0.1)
    finally:
        driver.kill()
        driver.wait()
    return starts


def compare(disturbed: Folder, calm: Folder, every: int, total: int) -> None:
    """Weights, average, moments and what is handed over, byte for byte; and metrics without gaps or doubles."""
    ours, theirs = checkpoint.latest(disturbed), checkpoint.latest(calm)
    assert ours is not None
    assert theirs is not None
    assert ours.images == theirs.images == total
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert ours.folder.read_bytes(name) == theirs.folder.read_bytes(name), name
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (disturbed / "export").read_bytes(name) == (calm / "export").read_bytes(name), name
    lines, expected = checkpoint.read_metrics(disturbed), checkpoint.read_metrics(calm)
    assert [line["images"] for line in lines] == list(range(every, total + 1, every))
    for key in ("loss", "loss_by_time", "grad_norm", "learning_rate"):
        assert [line[key] for line in lines] == [line[key] for line in expected], key
