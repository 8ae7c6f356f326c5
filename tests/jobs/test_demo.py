"""A demo that is cut off: by its terminal, or because `make` was killed. The whole of it is run by `make demo`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from jobs.local_cluster import STATE, LocalCluster

PROJECT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_demo_that_is_cut_off_leaves_nothing_running(tmp_path, number):
    log = tmp_path / "log"
    words = [sys.executable, "-m", "jobs.demo", "--config", "tiny", "--set", f"run_dir={tmp_path}/run"]
    # The parent stands for make: it starts the demo, and dies without a word when it is killed. Tests in the background of a shell ignore SIGINT.
    parent_code = (
        "import os, signal, subprocess, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "subprocess.Popen([*sys.argv[1:], '--end-with-parent', str(os.getpid())]).wait()"
    )
    with open(log, "wb") as sink:
        parent = subprocess.Popen([sys.executable, "-c", parent_code, *words], cwd=PROJECT, stdout=sink, stderr=sink)
    deadline = time.monotonic() + 300
    while "submitted as" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        assert parent.poll() is None, log.read_text()
        time.sleep(0.2)
    (demo,) = psutil.Process(parent.pid).children()
    cluster = LocalCluster(tmp_path / "run")
    cluster.state = {"id": LocalCluster.find(tmp_path / "run").state["id"]}
    processes = cluster.processes()
    assert processes
    if number == signal.SIGKILL:
        parent.kill()
    else:
        os.kill(demo.pid, signal.SIGINT)
    psutil.wait_procs([demo], timeout=90)
    parent.wait(30)
    assert not demo.is_running(), log.read_text()
    assert not cluster.processes()
    assert not (tmp_path / "run" / STATE).exists()
    assert not (tmp_path / "run" / "_lock.json").exists()
    assert "the same command continues from here" in log.read_text()
