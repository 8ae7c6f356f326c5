"""Faults planted one at a time, most of them for real: each is found, with what to do about it; a healthy machine and cluster have none."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import http.server
import importlib.metadata
import json
import os
import resource
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types

import psutil
import pytest
from doctor_facts import GIB, faults, healthy, the_fault
from fabricated_cluster import tiny

from jobs import access_checks, access_facts, doctor, facts, node_checks, store_facts
from jobs.findings import Facts
from jobs.local_cluster import PROJECT, LocalCluster
from paris_ray import host_memory


def test_facts_without_a_fault_have_none():
    assert not faults(Facts(address="http://10.0.0.1:8265", here=healthy(), nodes={"the cluster": [healthy(), healthy(node="b")]}))


# -- nodes: what their facts say ----------------------------------------------------------------------------------------

NODES = [
    ({"packages": {"ray": "2.60.0", "torch": None}, "pins": {"ray": "2.60.0", "torch": "2.9.0"}}, "versions", "torch is not installed", "make setup"),
    ({"gpus": 1, "driver": "535.104"}, "gpu", "driver 535.104, torch with CUDA 13.0", "update the driver"),
    ({"gpus": 1}, "gpu", "no NVIDIA driver answers", "install the driver"),
    ({"gpus": 1, "driver": "580.1", "torch_cuda": None}, "gpu", "without CUDA", "CUDA wheels"),
    ({"memory_free": 2 * GIB}, "room", "2.0 GiB of memory free", "larger machine"),
    ({"disk": {"path": "/tmp", "total": 1000 * GIB, "free": 40 * GIB}}, "room", "40.0 GiB free of 1,000.0 GiB at /tmp", "--temp-dir"),
    ({"shm": {"path": "/dev/shm", "total": 64 << 20, "free": 64 << 20}}, "room", "/dev/shm has 0.1 GiB", "--shm-size"),
    ({"object_store": 64 << 20}, "room", "object store of 0.1 GiB", "--object-store-memory"),
    ({"auth_mode": None}, "tokens", "RAY_AUTH_MODE is not set", "before `ray start`"),
    ({"clock_offset": -40.0}, "clock", "-40.0 s", "chrony"),
    ({"public_addresses": ["8.8.8.8"], "open_ports": [{"ip": "::", "port": 6379, "process": "raylet"}]}, "ports", "6379 (raylet)", "firewall"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "what", "value", "remedy"), NODES, ids=[value for _, _, value, _ in NODES])
def test_a_node(changes, what, value, remedy):
    the_fault(Facts(address="http://10.0.0.1:8265", here=healthy(), nodes={"the cluster": [healthy(**changes)]}), what, value, remedy)


def test_a_slow_question_is_no_skewed_clock():
    assert not faults(Facts(nodes={"the cluster": [healthy(clock_offset=7.0, clock_error=6.0)]}))


def test_a_driver_that_torch_takes():
    assert not faults(Facts(here=healthy(gpus=1, driver="580.65.06")))
    assert not faults(Facts(here=healthy(gpus=1, driver="535.104.05", torch_cuda="12.8")))


def test_a_node_that_does_not_tell():
    found = Facts(nodes={"the cluster": [healthy(), {"node": "b", "error": "GetTimeoutError"}]}, address="http://h:8265", here=healthy())
    the_fault(found, "nodes", "b: GetTimeoutError", "ray start")


# -- nodes: for real ----------------------------------------------------------------------------------------------------


def another_process(tmp_path, **options):
    """The facts that another process finds."""
    run = subprocess.run([sys.executable, "-m", "jobs.facts"], capture_output=True, text=True, cwd=tmp_path, check=True, timeout=120,
                         env={**os.environ, "RAY_ADDRESS": "", "PYTHONPATH": str(PROJECT), **options.pop("env", {})}, **options)  # fmt: skip
    (one,) = json.loads(run.stdout.strip().removeprefix(facts.MARK))["nodes"]
    return one


def test_another_environment_has_another_version(tmp_path):
    other = tmp_path / "other" / "numpy-1.26.4.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.26.4\n")
    there = another_process(tmp_path, env={"PYTHONPATH": f"{other.parent}:{PROJECT}"}) | {"node": "there"}
    here = facts.node() | {"node": "here"}
    found = [one for one in node_checks.versions(Facts(nodes={"the cluster": [here, there]})) if one.state == "fault"]
    assert {(one.where, one.value) for one in found} == {
        ("there", "numpy 1.26.4"), ("numpy", f"{here['packages']['numpy']} on here; 1.26.4 on there"),
    }  # fmt: skip
    assert all("constraints.txt" in one.remedy or "one image" in one.remedy for one in found)


def test_few_open_files(tmp_path):
    def few():
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))

    node = another_process(tmp_path, preexec_fn=few)
    (one,) = [one for one in node_checks.limits(Facts(here=node)) if one.state == "fault"]
    assert one.value == "open files: 512"
    assert "ulimit -n 65536" in one.remedy


def test_a_shells_usual_limit_of_open_files(tmp_path):
    """Most systems let a user have more than the 1024 of a shell, and Ray takes them; on a node Ray is there already, and has what it has."""

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)

    def usual():
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, most))

    node = another_process(tmp_path, preexec_fn=usual)
    assert not list(node_checks.limits(Facts(here=node)))
    (one,) = node_checks.limits(Facts(here=node, nodes={"the cluster": [node]}))
    assert one.value == "open files: 1024"
    told = subprocess.run([sys.executable, "-c", "import resource; from jobs.head import many_files; many_files()\n"
                           "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"], capture_output=True, text=True, check=True, preexec_fn=usual,
                          env={**os.environ, "PYTHONPATH": str(PROJECT)}).stdout  # fmt: skip
    assert told.split() == [str(most)] * 2


def test_what_the_driver_says(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 470.57.02\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert facts.driver() == "470.57.02"
    the_fault(Facts(here=healthy(gpus=1, driver=facts.driver())), "gpu", "driver 470.57.02", "update the driver")


def test_a_pod_on_a_large_machine(tmp_path, monkeypatch):
    """Of 2 GiB, of which files that were read have filled the most; whatever the machine has."""
    files = {"own": "0::/", "memory.max": 2 * GIB, "memory.current": 15 * GIB // 8, "memory.stat": f"anon {GIB // 8}\ninactive_file {3 * GIB // 2}"}
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    monkeypatch.setattr(host_memory, "OWN", tmp_path / "own")
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: types.SimpleNamespace(total=64 * GIB, available=50 * GIB))
    found = [one.value for one in node_checks.room(Facts(here=facts.node())) if "memory free" in one.value and one.state == "fault"]
    assert found == ["1.6 GiB of memory free of 2.0 GiB"]
    (tmp_path / "memory.max").write_text("max\n")
    assert facts.node()["memory_free"] == 50 * GIB


def test_the_cuda_of_torch_is_what_torch_says():
    (file,) = [one for one in importlib.metadata.files("torch") if str(one) == "torch/version.py"]
    says = runpy.run_path(str(file.locate()))
    assert facts.torch_cuda() == says["cuda"]
    assert facts.packages()["torch"] == says["__version__"].partition("+")[0]


def test_a_run_that_asks_for_gpus_where_there_is_none(tmp_path):
    config = tiny(tmp_path, "expert.resources.gpus=1")
    one = the_fault(Facts(here=healthy(), config=config), "gpu", "no node has one", "resources.gpus=0")
    assert "experts.0, experts.1" in one.rule
    scaling = Facts(here=healthy(), nodes={"the cluster": [healthy()]}, scales={"the cluster": True}, config=config)
    (one,) = [one for one in doctor.judge(scaling) if one.what == "gpu"]  # clusters that begin at none
    assert one.state == "not asked"
    assert "cluster_configs.check" in one.value


def test_another_ray_here_than_there():
    here = healthy(packages={"ray": "2.59.0", "torch": "2.9.0"})
    the_fault(
        Facts(here=here, nodes={"the cluster": [healthy()]}, address="http://h:8265"), "versions", "ray 2.60.0 there, 2.59.0 here", "constraints.txt"
    )


def test_a_clouds_public_address_is_not_seen_on_its_machine():
    there = healthy(cloud="Amazon EC2", open_ports=[{"ip": "0.0.0.0", "port": 6379, "process": "raylet"}])
    (one,) = [one for one in access_checks.ports(Facts(nodes={"the cluster": [there]})) if one.where == "a"]
    assert one.state == "not asked"


# -- answers over HTTP --------------------------------------------------------------------------------------------------


class Answer(http.server.BaseHTTPRequestHandler):
    """Says 200 to everybody, an hour ago."""

    def do_GET(self):
        self.send_response_only(200)
        self.send_header("Date", email.utils.formatdate(time.time() - 3600, usegmt=True))
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def open_server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_dashboard_that_takes_jobs_from_everybody(open_server):
    the_fault(Facts(dashboards={"eu": access_facts.dashboard(open_server, "ours")}), "tokens", "takes a request with no token", "RAY_AUTH_MODE=token")


def test_a_dashboard_that_does_not_answer():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        found = access_facts.dashboard(f"http://127.0.0.1:{one.getsockname()[1]}", "ours")
    the_fault(Facts(dashboards={"eu": found}), "tokens", "Connection refused", "ray status")


def test_a_port_that_speaks_no_http(monkeypatch):
    def greet(server):
        with contextlib.suppress(OSError):  # the server has gone
            while True:
                with server.accept()[0] as one:
                    one.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=greet, args=(server,), daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        the_fault(Facts(dashboards={"eu": access_facts.dashboard(url, "ours")}), "tokens", "does not answer: SSH-2.0-OpenSSH_9.6", "ray status")
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert store_facts.store_clock("s3://bucket/run") is None


@pytest.mark.parametrize("url", ["http://[bad", "head:8265", "http://"])
def test_an_address_that_is_none(url, capsys):
    assert doctor.main(["--address", url]) == 2
    said = capsys.readouterr()
    assert repr(url) in said.err
    assert "http://HOST:8265" in said.err
    label = "a" * 64  # longer than a name may be
    the_fault(Facts(dashboards={"eu": access_facts.dashboard(f"http://{label}:8265", "ours")}), "tokens", "does not answer", "ray status")


def test_a_dashboard_at_a_public_address():
    answers = {"without": 401, "wrong": 403, "ours": 200}
    the_fault(Facts(dashboards={"eu": {"address": "http://8.8.8.8:8265", **answers}}), "ports", "public address", "tunnel")
    for address in ("http://10.1.2.3:8265", "https://ray.example.com", "http://127.0.0.1:8265"):
        assert not faults(Facts(dashboards={"eu": {"address": address, **answers}}))


def test_the_stores_clock(open_server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", open_server)
    offset = store_facts.store_clock("s3://bucket/run")
    assert abs(offset + 3600) < 5
    store = {"uri": "s3://bucket/run", "bytes": 10**6, "write_s": 0.1, "read_s": 0.1, "same": True, "deleted": True, "error": None, "offset": offset,
             "sees": None}  # fmt: skip
    the_fault(Facts(stores={"here": store}), "clock", "-3600 s", "timedatectl")


# -- tokens and ports ---------------------------------------------------------------------------------------------------


def test_a_token_that_others_can_read(tmp_path):
    file = tmp_path / "token"
    file.write_text("a" * 64)
    file.chmod(0o644)
    the_fault(Facts(here=healthy(), token=access_facts.token_of_file(file)), "tokens", "mode 0644", f"chmod 600 {file}")
    file.chmod(0o600)
    assert not faults(Facts(here=healthy(), token=access_facts.token_of_file(file)))
    file.write_text("\n")
    the_fault(Facts(here=healthy(), token_files={"eu": access_facts.token_of_file(file)}), "tokens", "clusters.eu.token_file", "get-auth-token")


def test_a_token_that_is_not_there(tmp_path):
    absent = access_facts.token_of_file(tmp_path / "token")
    the_fault(Facts(here=healthy(), token=absent), "tokens", "the file is absent", "get-auth-token")
    assert not faults(Facts(here=healthy(auth_mode=None), token=absent))  # nobody asked for tokens, and no cluster is here


def test_a_client_without_a_mode():
    the_fault(Facts(address="http://h:8265", here=healthy(auth_mode=None)), "tokens", "RAY_AUTH_MODE: not set here", "RAY_AUTH_TOKEN_PATH")


def test_a_token_for_aws_that_nobody_renews(tmp_path, monkeypatch):
    """Google's are good for an hour, a kubelet's for a day; they are renewed after 20 minutes and 80 %."""
    file = tmp_path / "token"
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(file))
    now = 1_800_000_000
    monkeypatch.setattr(access_facts, "time", types.SimpleNamespace(time=lambda: now))

    def holding(minutes, old):
        claims = {"iat": now - 60 * old, "exp": now + 60 * (minutes - old), "sub": "b" * (old % 4)}
        parts = [base64.urlsafe_b64encode(json.dumps(one).encode()).rstrip(b"=").decode() for one in ({"alg": "none"}, claims)]
        file.write_text(".".join([*parts, "c2VjcmV0"]) + "\n")
        return Facts(here=healthy(web_identity=access_facts.web_identity()))

    for minutes, old in ((60, 0), (60, 21), (60, 50), (1440, 1153)):
        assert not faults(holding(minutes, old)), (minutes, old)
    for minutes, old, value in ((60, 55, "it ends in 5 min 00 s, and was good for 1 h 00 min"), (60, 190, "it ended 2 h 10 min ago")):
        one = the_fault(holding(minutes, old), "tokens", value, "pgrep cron")
        assert str(file) in one.where
    for text in ("", "not one", "a.b.c", "eyJhIjoxfQ.eyJhIjoxfQ.x", "a.W10.c"):
        file.write_text(text)
        one = the_fault(Facts(here=healthy(web_identity=access_facts.web_identity())), "tokens", "it holds no token (JWT)", "refresh.sh")
    file.unlink()
    the_fault(Facts(here=healthy(web_identity=access_facts.web_identity())), "tokens", "No such file", "refresh.sh")
    monkeypatch.delenv("AWS_WEB_IDENTITY_TOKEN_FILE")
    assert access_facts.web_identity() is None


def test_a_port_that_is_taken():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        number = one.getsockname()[1]
        assert access_facts.port(number)["holder"] is not None
        one.listen()
        found = the_fault(Facts(ports=[access_facts.port(number)]), "ports", str(number), "serve.port")
        assert f"process {os.getpid()}" in found.value
    assert not faults(Facts(ports=[access_facts.port(number)]))


# -- a real cluster -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    with LocalCluster(tmp_path_factory.mktemp("doctor"), num_cpus=2) as cluster:
        yield cluster


@pytest.fixture
def client(head, monkeypatch):
    """This process's environment is that of a client of the head."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    for name, value in head.env().items():
        monkeypatch.setenv(name, value)
    return head


def this_machine_lacks(fault):
    """Whether a machine of tests is as bad as that: by what the system says of itself, the head may open as many files as the user at all."""
    temp, (_, most_files) = shutil.disk_usage(tempfile.gettempdir()), resource.getrlimit(resource.RLIMIT_NOFILE)
    said = fault["what"], fault["value"]
    return (
        (psutil.virtual_memory().available < 5 * GIB and said[0] == "room" and "of memory free of" in said[1])
        or (temp.free < max(11 * GIB, 0.06 * temp.total) and said[0] == "room" and f"at {tempfile.gettempdir()}" in said[1])
        or (0 <= most_files < 8192 and said == ("limits", f"open files: {most_files}"))
        or (0 <= (processes := resource.getrlimit(resource.RLIMIT_NPROC)[0]) < 4096 and said == ("limits", f"processes: {processes}"))
    )


def test_a_healthy_cluster(client, tmp_path):
    run = ["--config", "tiny", "--set", f"run_dir={tmp_path / 'run'}", "--address", client.address]
    # A process of its own: in this one Ray may have read another test's token.
    done = subprocess.run([sys.executable, "-m", "jobs.doctor", *run, "--json"], cwd=PROJECT, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [one for one in found if one["state"] == "fault"]
    assert [one for one in wrong if not this_machine_lacks(one)] == [], done.stderr
    assert done.returncode == int(bool(wrong))
    values = {(one["what"], one["where"]): one["value"] for one in found}
    assert values["nodes", "the cluster"] == "1 of 1 told"
    assert values["tokens", f"the cluster ({client.address})"] == "refuses who has no token or a wrong one, and takes ours"
    assert sum(what == "storage" for what, _ in values) == 2  # as it is seen here, and on the node
    assert client.request("/api/jobs/") == []  # nothing is left
    assert not (tmp_path / "run").exists()


def test_a_wrong_token(client, tmp_path, monkeypatch, capsys):
    wrong = tmp_path / "token"
    wrong.touch(mode=0o600)
    wrong.write_text("b" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(wrong))
    assert doctor.main(["--address", client.address]) == 1
    said = capsys.readouterr().out
    assert "refuses the token from here" in said
    assert "RAY_AUTH_TOKEN_PATH names on its head" in said


def test_this_machine(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "RAY_PORTS", ())  # somebody's may run here
    code = doctor.main(["--json"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == int(any(one["state"] == "fault" for one in found))
    assert [one for one in found if one["state"] == "fault" and one["what"] != "tokens" and not this_machine_lacks(one)] == []
    assert any(one["where"] == facts.socket.gethostname() for one in found)
    assert {"versions", "room"} <= {one["what"] for one in found}
    assert doctor.main(["--set", "name=x"]) == 2
