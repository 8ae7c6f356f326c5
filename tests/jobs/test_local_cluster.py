"""A real local cluster: what it opens, who may use it, what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from jobs import local_cluster
from jobs.local_cluster import STATE, ClusterError, LocalCluster, stop_all


def listening(pids: set[int]) -> set[tuple[str, int]]:
    """Addresses on which processes listen."""
    found = (c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in pids)
    return {(c.laddr.ip.removeprefix("::ffff:"), c.laddr.port) for c in found}


@pytest.fixture(autouse=True)
def own_temp(monkeypatch, tmp_path_factory):
    """No test here sees, or ends, the clusters of another run of the project on this machine."""
    folder = tmp_path_factory.getbasetemp() / "t"
    folder.mkdir(exist_ok=True)
    link = f"/tmp/pt{os.getpid()}"
    os.symlink(folder, link)
    monkeypatch.setattr(local_cluster, "_short_temp", lambda: link)
    yield
    os.unlink(link)


def test_life_of_a_cluster(tmp_path):
    with LocalCluster(tmp_path, num_cpus=2) as cluster:
        processes = cluster.processes()
        temp_dir = cluster.temp_dir
        ports = listening({process.pid for process in processes})
        assert len(ports) >= 4
        assert {ip for ip, _ in ports} == {"127.0.0.1"}
        assert stat.S_IMODE((temp_dir / "token").stat().st_mode) == 0o600
        assert stat.S_IMODE(temp_dir.stat().st_mode) == 0o700

        # Nobody without the token lists jobs, submits one, sends code or deploys.
        job = json.dumps({"entrypoint": "true"}).encode()
        for method, path, body in (
            ("GET", "jobs/", None), ("POST", "jobs/", job), ("PUT", "packages/gcs/one.zip", b"code"), ("PUT", "serve/applications/", b"{}"),
            ("GET", "v0/nodes", None), ("GET", "v0/logs", None),
        ):  # fmt: skip
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                with pytest.raises(urllib.error.HTTPError) as refused:
                    urllib.request.urlopen(urllib.request.Request(f"{cluster.address}/api/{path}", body, headers, method=method), timeout=10)
                assert refused.value.code in (401, 403), path
        assert cluster.request("/api/jobs/") == []

        again = LocalCluster.find(tmp_path)
        assert again is not None
        assert again.address == cluster.address
    assert not [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not listening({process.pid for process in psutil.process_iter()}) & ports
    assert not temp_dir.exists()
    assert not (tmp_path / STATE).exists()
    assert LocalCluster.find(tmp_path) is None


OWNER = """
import sys, time
from jobs import local_cluster
local_cluster._short_temp = lambda: sys.argv[2]
local_cluster.exit_on_signals()
with local_cluster.LocalCluster(sys.argv[1], num_cpus=2) as cluster:
    print("up", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_its_owner(tmp_path, number):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, tmp_path, local_cluster._short_temp()], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "up\n"
    cluster = LocalCluster.find(tmp_path)
    assert cluster is not None
    processes = cluster.processes()
    owner.send_signal(number)
    owner.wait(60)
    if number == signal.SIGKILL:
        # It outlives its owner, with its jobs; the next one finds it, and `make stop` ends it.
        assert LocalCluster.find(tmp_path) is not None
        assert stop_all() == [str(tmp_path)]
    assert not [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert stop_all() == []


@pytest.mark.parametrize(("before", "kept"), [([], False), (["nohup"], True)])
def test_nohup_is_respected(before, kept):
    # The tests themselves may run under nohup.
    fresh = "" if before else "signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    code = (
        f"import signal; {fresh}from jobs.local_cluster import exit_on_signals; exit_on_signals(); "
        "print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"
    )
    answer = subprocess.run([*before, sys.executable, "-c", code], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    assert answer.stdout.strip() == str(kept)


def test_a_head_that_dies_is_cleared_away(tmp_path):
    cluster = LocalCluster(tmp_path, num_cpus=2).start()
    processes = cluster.processes()
    os.kill(cluster.state["pid"], signal.SIGKILL)
    time.sleep(0.5)
    assert LocalCluster.find(tmp_path) is None
    assert not [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not (tmp_path / STATE).exists()


def test_a_cluster_that_cannot_start_says_why(tmp_path, monkeypatch):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("raise RuntimeError('this Ray is broken')")
    env = LocalCluster._server_env
    monkeypatch.setattr(LocalCluster, "_server_env", lambda self: {**env(self), "PYTHONPATH": f"{tmp_path}:{local_cluster.PROJECT}"})
    with pytest.raises(ClusterError, match=r"(?s)ended at its start \(exit code 1\); its logs are in .*this Ray is broken"):
        LocalCluster(tmp_path / "run", num_cpus=2).start()
    assert not (tmp_path / "run" / STATE).exists()


def test_only_what_this_folders_cluster_wrote_is_believed(tmp_path, monkeypatch):
    """Found in a copied run, or forged: its folder must neither be deleted nor its cluster taken over."""
    precious = tmp_path / "precious"
    precious.mkdir()
    mine = Path(local_cluster._short_temp()) / f"paris-test-{os.getpid()}"
    mine.mkdir()
    try:
        for temp, folder in ((precious, tmp_path), (mine, tmp_path / "another run")):
            state = {"id": "0" * 16, "pid": os.getpid(), "started": 1.0, "temp_dir": str(temp), "folder": str(folder)}
            (tmp_path / STATE).write_text(json.dumps(state))
            assert LocalCluster.find(tmp_path) is None
            assert temp.exists()
    finally:
        mine.rmdir()


def test_a_process_with_the_same_number_is_not_the_cluster(tmp_path):
    # As after a reboot: the number belongs to somebody else by now.
    cluster = LocalCluster(tmp_path)
    cluster.state = {"id": "0" * 16, "pid": os.getpid(), "started": 1.0, "temp_dir": str(tmp_path / "ray")}
    assert not cluster.alive()
    cluster.stop()
