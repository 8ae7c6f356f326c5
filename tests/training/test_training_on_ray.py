"""A real Ray Train run, killed in the middle, against an undisturbed one in a folder that holds nothing but shard, config and encoders."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import fake_training_run as fake
import psutil
import pytest

from paris_ray import manifest
from paris_ray.storage import Folder
from paris_ray.training import checkpoint
from paris_ray.training.expert import train_expert
from paris_ray.training.launch import TrainingError

EXPORTED = ("config.json", "diffusion_pytorch_model.safetensors")
SETTINGS = {"expert__train__images": 4000, "expert__train__checkpoint_images": 800, "expert__train__keep_checkpoints": 2}


def train_workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


class Killer(threading.Thread):
    """Kills the training worker with signal 9 once a number of images is in a checkpoint, and asks the next one to go at another."""

    def __init__(self, stage: Folder, kill_at: int, ask_at: int):
        super().__init__(daemon=True)
        self.stage, self.kill_at, self.ask_at = stage, kill_at, ask_at
        self.killed_at = self.asked_at = self.left_at = None

    def checkpoints(self) -> list[int]:
        names = (self.stage / "checkpoints").folders()
        return [int(n.removeprefix("images-")) for n in names if (self.stage / "checkpoints").exists(f"{n}/_manifest.json")]

    def signal_at(self, images: int, number: signal.Signals) -> int:
        while True:
            done = max(self.checkpoints(), default=0)
            workers = train_workers() if done >= images else []
            time.sleep(0.3 if workers else 0.02)  # into the interval
            for process in workers:
                os.kill(process.pid, number)
            if workers:
                return done

    def run(self):
        self.killed_at = self.signal_at(self.kill_at, signal.SIGKILL)
        self.asked_at = self.signal_at(self.ask_at, signal.SIGTERM)
        while train_workers():
            time.sleep(0.02)
        self.left_at = max(self.checkpoints())


@pytest.mark.chaos  # test_killed_on_ray.py has a shorter form
@pytest.mark.usefixtures("ray_local")
def test_killed_and_alone_are_bit_equal(tmp_path):
    whole = fake.make_run(tmp_path / "whole", **SETTINGS)
    alone = fake.make_run(tmp_path / "alone", experts=[1], **SETTINGS)
    killed, undisturbed = (Folder(c.run_dir) / "experts" / "1" for c in (whole, alone))
    killer = Killer(killed, kill_at=800, ask_at=1600)
    killer.start()
    first = train_expert(whole, 1)
    assert killer.killed_at is not None
    # Asked to go, it left a checkpoint where it was, between two that were due.
    assert killer.asked_at < killer.left_at < 4000
    assert killer.left_at % 800
    second = train_expert(alone, 1)

    assert first["counts"]["restarts"] == 2
    assert second["counts"]["restarts"] == 0
    # Three starts of a worker for the same steps: less of the time was spent in them.
    assert 0 < first["counts"]["goodput"] < second["counts"]["goodput"] < 1
    for name in EXPORTED:
        assert (killed / "export").read_bytes(name) == (undisturbed / "export").read_bytes(name)
    # One identity, whatever the clocks said; and only what was read is there.
    assert first["fingerprint"] == second["fingerprint"]
    assert sorted(p.name for p in (tmp_path / "alone").iterdir()) == [".ray", "encoders", "events", "experts", "shards"]
    assert [p.name for p in (tmp_path / "alone" / "shards").iterdir()] == ["expert=1"]
    assert [line["images"] for line in checkpoint.read_metrics(killed)] == [line["images"] for line in checkpoint.read_metrics(undisturbed)]
    assert [line["loss"] for line in checkpoint.read_metrics(killed)] == [line["loss"] for line in checkpoint.read_metrics(undisturbed)]

    event = (Folder(whole.run_dir) / "events").read_json("expert-1.json")
    assert (event["state"], event["done"], event["total"]) == ("done", 4000, 4000)
    # Done is done: nothing starts again, and the manifest stays.
    assert train_expert(whole, 1) == manifest.published(killed)


@pytest.mark.usefixtures("ray_local")
def test_what_a_retry_cannot_cure_is_not_retried(tmp_path):
    config = fake.make_run(tmp_path, experts=[0], expert__train__learning_rate=1e30, expert__train__warmup_images=0)
    with pytest.raises(TrainingError, match=r"expert-0: not a finite number at image \d+ .*Lower train.learning_rate"):
        train_expert(config, 0)
    event = (Folder(config.run_dir) / "events").read_json("expert-0.json")
    assert event["state"] == "failed"
    assert "not a finite number" in event["message"]
    assert (Folder(config.run_dir) / "experts" / "0").read_json("_attempts.json") == {"attempts": 1}


def test_driver_needs_no_torch():
    code = (
        "import sys; from jobs import train_expert, train_router; early = 'ray' in sys.modules;"
        "from paris_ray.training import launch; launch._trainer(1); print(early, 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False", "False"]
