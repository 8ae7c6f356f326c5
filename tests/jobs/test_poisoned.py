"""A shard with a value that is no number, in a real run of several experts: who reads it stops and says where, the others finish."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fabricated_run
import fake_training_run as fake

from jobs import cli
from paris_ray.storage import Folder
from paris_ray.training import checkpoint
from paris_ray.training.draws import Draws

PROJECT = Path(__file__).parent.parent.parent
ROW = 19


def test_a_poisoned_expert_stops_alone(tmp_path):
    sets = {"evaluation__control_router": False, "router__train__images": 160}
    config = fabricated_run.make(tmp_path, poisoned={1: ROW}, **sets)
    arguments = [word for key, value in sets.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
    command = [sys.executable, "-m", "jobs.run_all", "--config", "tiny", "--set", f"run_dir={tmp_path}", *arguments]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 1, done.stdout + done.stderr

    # The step that read the row, by the order of the draws: the first, 36 rows a pass and 8 a step.
    bad = fabricated_run.train_ids(fake.rows_of(1))[ROW]
    order = Draws(config.seed, "expert-1", 36, (1,), 0.0)(0, 36).rows.tolist()
    image = (order.index(ROW) // 8 + 1) * 8
    said = f"expert-1: not a finite number at image {image} (loss nan, gradient norm nan); stopped before the update"
    assert said in done.stdout
    assert f"What it read is no number either, in the rows {bad}: copy their shard anew, or pass --rebuild partition" in done.stdout
    event = json.loads((tmp_path / "events" / "expert-1.json").read_text())
    assert (event["state"], event["message"][: len(said)]) == ("failed", said)
    # It is not tried again; who reads all shards meets the row as well, and what needs either is not started.
    for name in ("expert-1", "router"):
        assert f"{name}: giving up" in done.stdout
        assert f"{name}: failed; its logs are in {tmp_path}/events/logs/{name}-a*.log" in done.stdout
        assert not (tmp_path / "events" / "logs" / f"{name}-a2.log").exists()
    assert "not started, because what they need failed: assemble" in done.stdout
    for k in (0, 2):
        assert cli.status(config, f"expert-{k}").state == "valid"
        assert checkpoint.read_metrics(Folder(tmp_path) / "experts" / str(k))[-1]["images"] == 320
    assert not (tmp_path / "experts" / "1" / "export").exists()
