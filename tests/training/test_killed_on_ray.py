"""A training whose parts are killed with signal 9, on a cluster of two nodes, against one that nobody disturbed: the same bytes.

What is killed while others train is in tests/jobs; workers that are killed or asked to go, in test_training_on_ray.py.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import fake_training_run as fake
import pytest
import torch
from killing import KINDS, Ground, Kill, compare, train

from paris_ray import config as configs
from paris_ray.config import RunConfig
from paris_ray.storage import Folder
from paris_ray.training import worker
from paris_ray.training.loop import Place

EVERY = 40
"""Images between two metrics lines; checkpoints are at multiples of it."""


@pytest.fixture(scope="module")
def ground():
    place = Ground()
    yield place
    place.close()


def make_run(path: Path, **sets: object) -> RunConfig:
    settings = {"expert__resources__max_failures": -1, "expert__train__log_images": EVERY, **sets}
    config = fake.make_run(path, experts=[1], **settings)
    Folder(path).write_bytes("config.yaml", configs.dump(config).encode())
    return config


def calm(path: Path, **sets: object) -> Folder:
    """Trained in this process and in one go."""
    worker.run(make_run(path, **sets), "expert-1", Place(torch.device("cpu")))
    return Folder(path) / "experts" / "1"


@pytest.mark.timeout(1200)  # more than the sum of what it waits for, whose own messages say more
def test_controller_node_and_driver_are_killed(tmp_path, ground):
    images, interval = 8000, 800
    sets = {"expert__train__images": images, "expert__train__checkpoint_images": interval}
    kills = [Kill("controller", 0.1), Kill("node", 0.2), Kill("driver", 0.15)]
    config = make_run(tmp_path / "killed", **sets)
    starts = train(ground, config, 1, kills, tmp_path / "log")
    # A node is Ray Train's to replace; without its controller a job ends, and the same command goes on.
    assert starts == 3
    compare(Folder(config.run_dir) / "experts" / "1", calm(tmp_path / "calm", **sets), EVERY, images)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return calm(tmp_path_factory.mktemp("calm"), **LONG)


INTERVAL = 400
LONG = {
    # Large enough that a checkpoint takes a tenth of a second, in which it can be hit.
    "expert__model__hidden_size": 256, "expert__model__num_layers": 4, "expert__train__images": 4800, "expert__train__checkpoint_images": INTERVAL,
}  # fmt: skip


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_five_deaths_at_random_moments(tmp_path, ground, undisturbed, kind):
    seed = int(os.environ.get("CHAOS_SEED", time.time_ns() % 100_000))
    print(f"\n{kind}: CHAOS_SEED={seed}", flush=True)
    moments = random.Random(f"{seed} {kind}")
    # Two of five while a checkpoint is written.
    kills = [Kill(kind, None if i in (1, 3) else moments.uniform(0.0, 4.0)) for i in range(5)]
    config = make_run(tmp_path, **LONG)
    began = time.monotonic()
    starts = train(ground, config, 1, kills, tmp_path / "log")
    print(f"{kind}: {starts} starts of the command, {time.monotonic() - began:.0f} s", flush=True)
    assert starts == (1 if kind in ("worker", "node") else 6)
    if kind == "worker":
        assert any(kill.unfinished for kill in kills)
    compare(Folder(config.run_dir) / "experts" / "1", undisturbed, EVERY, LONG["expert__train__images"])
