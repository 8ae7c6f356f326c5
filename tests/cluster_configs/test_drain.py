"""What a pod does before it ends, with processes that are called as Ray's are."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from cluster_configs import drain
from paris_ray.training import termination

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
    monkeypatch.setattr(termination, "END", tmp_path / "end")

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


def ray_that_says(folder: Path, code: int = 0, after: str = "0") -> None:
    # What it finds in place of the training's file says which of the two was first.
    (folder / "ray").write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\nsleep {after}; cp {folder}/worker {folder}/then 2>&-; exit {code}\n')
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


def test_the_head_is_told_first_and_trainings_when(tmp_path, started, monkeypatch):
    """Else Train would place the worker on this node again, and the checkpoint would be given Kubernetes' 30 s."""
    ray_that_says(tmp_path, after="1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    file = started("ray::RayTrainWorker.poll_status", "worker")
    before = time.monotonic()
    assert drain.main(["--seconds", "20"]) == 0
    assert file.read_text() == "checkpoint"
    assert not (tmp_path / "then").exists()  # no checkpoint yet when the head had heard
    assert 0 <= float(termination.END.read_text()) - before - 20 < 5
    # As the worker, that is another process, takes the signal.
    monkeypatch.setattr(termination, "_asked", threading.Event())
    monkeypatch.setattr(termination, "_ends", [])
    termination.ask()
    assert termination.seconds_left() == pytest.approx(before + 20 - time.monotonic(), abs=5)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")  # no pod: the file is somebody's
    monkeypatch.setattr(termination, "_ends", [])
    termination.END.write_text("0")
    termination.ask()
    assert termination.seconds_left() == pytest.approx(termination.GRACE_S, abs=5)


@pytest.mark.parametrize("content", [None, "", "soon"])
def test_a_pod_that_nobody_drained_has_kubernetes_seconds(tmp_path, monkeypatch, content):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setattr(termination, "END", tmp_path / "end")
    monkeypatch.setattr(termination, "_asked", threading.Event())
    monkeypatch.setattr(termination, "_ends", [])
    if content is not None:
        termination.END.write_text(content)
    termination.ask()
    assert termination.seconds_left() == pytest.approx(30, abs=5)


def test_a_head_that_hangs_is_not_waited_for(tmp_path, started, monkeypatch, capsys):
    ray_that_says(tmp_path, after="60")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(drain, "HEAD_S", 0.5)
    file = started("ray::RayTrainWorker.poll_status", "worker")
    before = time.monotonic()
    assert drain.main(["--seconds", "40"]) == 0
    assert file.read_text() == "checkpoint"
    assert time.monotonic() - before < 30
    assert "has not ended" in capsys.readouterr().err


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
