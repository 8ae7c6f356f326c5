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
SETTINGS = {"expert__train__images": 2400, "expert__train__checkpoint_images": 160, "expert__train__keep_checkpoints": 2}


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
    """Kills the training worker with signal 9 once a number of images is in a checkpoint."""

    def __init__(self, stage: Folder, images: int):
        super().__init__(daemon=True)
        self.stage, self.images, self.killed_at = stage, images, None

    def run(self):
        while self.killed_at is None:
            names = (self.stage / "checkpoints").folders()
            done = [int(n.removeprefix("images-")) for n in names if (self.stage / "checkpoints").exists(f"{n}/_manifest.json")]
            if done and max(done) >= self.images:
                for process in train_workers():
                    os.kill(process.pid, signal.SIGKILL)
                    self.killed_at = max(done)
            time.sleep(0.02)


@pytest.mark.usefixtures("ray_local")
def test_killed_and_alone_are_bit_equal(tmp_path):
    whole = fake.make_run(tmp_path / "whole", **SETTINGS)
    alone = fake.make_run(tmp_path / "alone", experts=[1], **SETTINGS)
    killed, undisturbed = (Folder(c.run_dir) / "experts" / "1" for c in (whole, alone))
    killer = Killer(killed, images=640)
    killer.start()
    first = train_expert(whole, 1)
    assert killer.killed_at is not None
    second = train_expert(alone, 1)

    assert first["counts"]["restarts"] == 1
    assert second["counts"]["restarts"] == 0
    for name in EXPORTED:
        assert (killed / "export").read_bytes(name) == (undisturbed / "export").read_bytes(name)
    # One identity, whatever the clocks said; and only what was read is there.
    assert first["fingerprint"] == second["fingerprint"]
    assert sorted(p.name for p in (tmp_path / "alone").iterdir()) == [".ray", "encoders", "events", "experts", "shards"]
    assert [p.name for p in (tmp_path / "alone" / "shards").iterdir()] == ["expert=1"]
    assert [line["images"] for line in checkpoint.read_metrics(killed)] == [line["images"] for line in checkpoint.read_metrics(undisturbed)]
    assert [line["loss"] for line in checkpoint.read_metrics(killed)] == [line["loss"] for line in checkpoint.read_metrics(undisturbed)]

    event = (Folder(whole.run_dir) / "events").read_json("expert-1.json")
    assert (event["state"], event["done"], event["total"]) == ("done", 2400, 2400)
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
