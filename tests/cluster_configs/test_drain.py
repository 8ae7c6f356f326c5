"""What a pod does before it ends, with processes that are called as Ray's are."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster_configs import drain

SLOW = """
import signal, sys, time
def end(*_):
    time.sleep(0.5)
    open(sys.argv[1], "w").write("checkpoint")
    sys.exit()
signal.signal(signal.SIGTERM, end)
open(sys.argv[1] + ".ready", "w")
time.sleep(60)
"""


@pytest.fixture
def started(tmp_path, monkeypatch):
    running = []
    # The pod's processes are those that a test has started: there may be others' trainings on this machine.
    monkeypatch.setattr(drain.psutil, "process_iter", lambda attributes: [_seen(one.pid, attributes) for one in running])
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")

    def start(title: str, name: str) -> Path:
        file = tmp_path / name
        running.append(subprocess.Popen([title, "-c", SLOW, str(file)], executable=sys.executable))
        deadline = time.monotonic() + 30
        while not Path(f"{file}.ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        return file

    start.running = running
    yield start
    for one in running:
        one.kill()
        one.wait()


def _seen(pid: int, attributes: list[str]) -> psutil.Process:
    process = psutil.Process(pid)
    process.info = process.as_dict(attributes)
    return process


def ray_that_says(folder: Path, code: int = 0) -> None:
    (folder / "ray").write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\nexit {code}\n')
    (folder / "ray").chmod(0o755)


def test_trainings_are_asked_for_a_checkpoint_and_waited_for(tmp_path, started, monkeypatch):
    ray_that_says(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    file, other = started("ray::RayTrainWorker.poll_status", "worker"), started("ray::IDLE", "idle")
    assert drain.main(["--seconds", "20"]) == 0
    assert file.read_text() == "checkpoint"
    assert not other.exists()
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("drain-node --reason DRAIN_NODE_REASON_PREEMPTION")
    assert asked.split()[-2:] == ["--deadline-remaining-seconds", "20"]


def test_replicas_are_waited_for_and_left_alone(tmp_path, started, monkeypatch):
    ray_that_says(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    file = started("ray::ServeReplica:paris:Sampler", "replica")
    assert drain.main(["--seconds", "1"]) == 0
    assert not file.exists()
    assert started.running[0].poll() is None


def test_a_head_that_does_not_answer_stops_no_checkpoint(tmp_path, started, monkeypatch, capsys):
    ray_that_says(tmp_path, code=1)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    file = started("ray::RayTrainWorker.poll_status", "worker")
    assert drain.main(["--seconds", "20"]) == 0
    assert file.read_text() == "checkpoint"
    assert "ray drain-node" in capsys.readouterr().err


def test_ray_has_that_command_and_these_options():
    from ray.scripts.scripts import drain_node

    options = {one for each in drain_node.params for one in each.opts}
    assert {"--reason", "--reason-message", "--deadline-remaining-seconds"} <= options
    reasons = next(each.type.choices for each in drain_node.params if each.name == "reason")
    assert "DRAIN_NODE_REASON_PREEMPTION" in reasons


def test_outside_a_pod_nobodys_trainings_are_ended(started, monkeypatch, capsys):
    file = started("ray::RayTrainWorker.poll_status", "worker")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    assert drain.main(["--seconds", "5"]) == 2
    assert "this is no pod" in capsys.readouterr().err
    assert started.running[0].poll() is None
    assert not file.exists()
