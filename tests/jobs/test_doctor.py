"""Faults planted one at a time, most of them for real: each is found, with what to do about it; a healthy machine and cluster have none."""

from __future__ import annotations

import copy
import email.utils
import errno
import http.server
import importlib.metadata
import json
import multiprocessing
import os
import resource
import runpy
import socket
import subprocess
import sys
import threading
import time
import types

import fsspec
import pytest
from fabricated_cluster import tiny
from fsspec.implementations.memory import MemoryFileSystem

from jobs import access_checks, doctor, facts, node_checks
from jobs.findings import Facts, clouds
from jobs.local_cluster import PROJECT, LocalCluster

GIB = 1 << 30


def healthy(**changes):
    """A node that nothing is wrong with."""
    pins = {"ray": "2.60.0", "torch": "2.9.0"}
    node = {
        "node": "a", "python": "3.11.7", "pins": pins, "packages": dict(pins), "torch_cuda": "13.0", "driver": None, "gpus": 0,
        "memory": 32 * GIB, "memory_free": 16 * GIB, "disk": {"path": "/tmp", "total": 100 * GIB, "free": 50 * GIB},
        "shm": {"path": "/dev/shm", "total": 8 * GIB, "free": 8 * GIB}, "open_files": 65536, "processes": -1, "auth_mode": "token",
        "public_addresses": [], "open_ports": [], "object_store": GIB, "clock_offset": 0.01, "clock_error": 0.02,
    }  # fmt: skip
    return {**copy.deepcopy(node), **changes}


def faults(found):
    return [one for one in doctor.judge(found) if one.state == "fault"]


def the_fault(found, what, value, remedy):
    """The one fault, of which the rule and the remedy are told."""
    (one,) = faults(found)
    assert one.what == what
    assert value in f"{one.where}: {one.value}", one
    assert remedy in one.remedy, one
    assert one.rule
    return one


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
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    node = another_process(tmp_path, preexec_fn=few)
    (one,) = [one for one in node_checks.limits(Facts(here=node)) if one.state == "fault"]
    assert one.value == "open files: 512"
    assert "ulimit -n 65536" in one.remedy


def test_what_the_driver_says(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 470.57.02\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert facts.driver() == "470.57.02"
    the_fault(Facts(here=healthy(gpus=1, driver=facts.driver())), "gpu", "driver 470.57.02", "update the driver")


def test_the_cuda_of_torch_is_what_torch_says():
    (file,) = [one for one in importlib.metadata.files("torch") if str(one) == "torch/version.py"]
    says = runpy.run_path(str(file.locate()))
    assert facts.torch_cuda() == says["cuda"]
    assert facts.packages()["torch"] == says["__version__"].partition("+")[0]


def test_a_run_that_asks_for_gpus_where_there_is_none(tmp_path):
    config = tiny(tmp_path, "expert.resources.gpus=1")
    one = the_fault(Facts(here=healthy(), config=config), "gpu", "no node has one", "resources.gpus=0")
    assert "experts.0, experts.1" in one.rule


# -- the store ----------------------------------------------------------------------------------------------------------


class Planted(MemoryFileSystem):
    """A store in memory with a fault."""

    store: dict = {}  # noqa: RUF012, as its parent has it
    pseudo_dirs = [""]  # noqa: RUF012
    quota = None
    seconds = 0.0
    flip = False
    keeps = False

    def _open(self, path, mode="rb", **options):
        file = super()._open(path, mode, **options)
        if "w" in mode:
            time.sleep(self.seconds)
            if self.quota is not None:

                def write(data):
                    raise OSError(errno.EDQUOT, "Disk quota exceeded")

                file.write = write
        elif self.flip:
            data = bytearray(file.getvalue())
            data[len(data) // 2] ^= 1
            file = __import__("io").BytesIO(bytes(data))
        return file

    def rm_file(self, path):
        if not self.keeps:
            super().rm_file(path)


@pytest.fixture
def planted(monkeypatch):
    """A folder's URI in a store; its faults are set with ``setattr``."""
    fsspec.register_implementation("planted", Planted, clobber=True)
    monkeypatch.setattr(Planted, "protocol", "planted")
    monkeypatch.setattr(Planted, "store", {})
    monkeypatch.setattr(Planted, "cachable", False)
    return "planted://bucket/run"


STORES = [
    ({}, None, None),
    ({"quota": 0}, "Disk quota exceeded", "raise the quota"),
    ({"flip": True}, "another checksum", "do not train here"),
    ({"keeps": True}, "still there", "right to delete"),
    ({"seconds": 0.5}, "writes 0 MB/s", "nodes' region"),
]


@pytest.mark.parametrize(("fault", "value", "remedy"), STORES, ids=["none", "quota", "flipped bit", "keeps what is deleted", "slow"])
def test_a_store(planted, monkeypatch, fault, value, remedy):
    for key, one in fault.items():
        monkeypatch.setattr(Planted, key, one)
    found = Facts(stores={"here": facts.store(planted, 1 << 17)})
    if value is None:
        assert not faults(found)
        assert not Planted.store
    else:
        the_fault(found, "storage", value, remedy)


def test_a_store_is_measured_against_the_runs_checkpoints(tmp_path):
    """An XL/2's 12 GB within the 30 s of Google's notice; the published network has 0.61 billion weights, of which we keep 16 bytes each."""
    big = tiny(tmp_path, "expert.model.size=XL/2", "expert.resources.preemption=gcp")
    assert 0.55e9 < access_checks.checkpoint_bytes(big) / 16 < 0.9e9
    store = {"uri": "x", "bytes": 16_000_000, "write_s": 0.1, "read_s": 0.01, "same": True, "deleted": True, "error": None, "offset": None}
    assert not faults(Facts(config=tiny(tmp_path), stores={"here": store}))  # 160 MB/s
    one = the_fault(Facts(config=big, stores={"here": store}), "storage", "writes 160 MB/s", "smaller experts")
    assert float(one.rule.split()[2].replace(",", "")) > 12_000 / 30


def as_nobody(path, results):
    if os.getuid() == 0:
        os.setuid(65534)
    results.put(facts.store(path, 1000))


def test_a_folder_that_is_read_only(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir(mode=0o555)
    for parent in (tmp_path, *tmp_path.parents):  # pytest's own are closed to others
        if parent.stat().st_uid == os.getuid() and parent.name.startswith(("pytest", "test_")):
            parent.chmod(0o755)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=as_nobody, args=(str(folder), results))
    child.start()
    found = results.get(timeout=60)
    child.join()
    the_fault(Facts(stores={"here": found}), "storage", "write: PermissionError", "name another run_dir")
    assert not list(folder.iterdir())


def test_a_local_folder_is_left_as_it_was(tmp_path):
    assert not faults(Facts(stores={"here": facts.store(str(tmp_path / "run"), 1 << 22), "there": facts.store(str(tmp_path), 1 << 22)}))
    assert not list(tmp_path.iterdir())


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
    the_fault(Facts(dashboards={"eu": facts.dashboard(open_server, "ours")}), "tokens", "takes a request with no token", "RAY_AUTH_MODE=token")


def test_a_dashboard_that_does_not_answer():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        found = facts.dashboard(f"http://127.0.0.1:{one.getsockname()[1]}", "ours")
    the_fault(Facts(dashboards={"eu": found}), "tokens", "Connection refused", "ray status")


def test_a_dashboard_at_a_public_address():
    answers = {"without": 401, "wrong": 403, "ours": 200}
    the_fault(Facts(dashboards={"eu": {"address": "http://8.8.8.8:8265", **answers}}), "ports", "public address", "tunnel")
    for address in ("http://10.1.2.3:8265", "https://ray.example.com", "http://127.0.0.1:8265"):
        assert not faults(Facts(dashboards={"eu": {"address": address, **answers}}))


def test_the_stores_clock(open_server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", open_server)
    offset = facts.store_clock("s3://bucket/run")
    assert abs(offset + 3600) < 5
    store = {"uri": "s3://bucket/run", "bytes": 10**6, "write_s": 0.1, "read_s": 0.1, "same": True, "deleted": True, "error": None, "offset": offset}
    the_fault(Facts(stores={"here": store}), "clock", "-3600 s", "timedatectl")


# -- tokens and ports ---------------------------------------------------------------------------------------------------


def test_a_token_that_others_can_read(tmp_path):
    file = tmp_path / "token"
    file.write_text("a" * 64)
    file.chmod(0o644)
    the_fault(Facts(here=healthy(), token=facts.token_of_file(file)), "tokens", "mode 0644", f"chmod 600 {file}")
    file.chmod(0o600)
    assert not faults(Facts(here=healthy(), token=facts.token_of_file(file)))
    file.write_text("\n")
    the_fault(Facts(here=healthy(), token_files={"eu": facts.token_of_file(file)}), "tokens", "clusters.eu.token_file", "get-auth-token")


def test_a_token_that_is_not_there(tmp_path):
    absent = facts.token_of_file(tmp_path / "token")
    the_fault(Facts(here=healthy(), token=absent), "tokens", "the file is absent", "get-auth-token")
    assert not faults(Facts(here=healthy(auth_mode=None), token=absent))  # nobody asked for tokens, and no cluster is here


def test_a_client_without_a_mode():
    the_fault(Facts(address="http://h:8265", here=healthy(auth_mode=None)), "tokens", "RAY_AUTH_MODE: not set here", "RAY_AUTH_TOKEN_PATH")


def test_a_port_that_is_taken():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        number = one.getsockname()[1]
        assert facts.port(number)["holder"] is not None
        one.listen()
        found = the_fault(Facts(ports=[facts.port(number)]), "ports", str(number), "serve.port")
        assert f"process {os.getpid()}" in found.value
    assert not faults(Facts(ports=[facts.port(number)]))


# -- quotas -------------------------------------------------------------------------------------------------------------


def test_quotas(tmp_path, monkeypatch):
    config = tiny(tmp_path, "expert.resources.gpus=1", "expert.resources.preemption=aws")
    assert clouds(config) == ["aws"]
    told = types.SimpleNamespace(get_service_quota=lambda ServiceCode, QuotaCode: {"Quota": {"Value": 0.0}})
    monkeypatch.setitem(sys.modules, "boto3", types.SimpleNamespace(client=lambda name: told))
    node = healthy(gpus=1, driver="580.1")
    one = the_fault(Facts(config=config, here=node, quotas={"aws": facts.quotas("aws")}), "quotas", "spot G and VT: 0 vCPUs", "Service Quotas")
    assert one.where == "aws"
    for cloud, module in (("aws", None), ("gcp", None)):
        monkeypatch.setitem(sys.modules, "boto3", module)
        found = doctor.judge(Facts(config=config, here=node, quotas={cloud: facts.quotas(cloud)}))
        assert [one.state for one in found if one.what == "quotas"] == ["not asked"]


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


def test_a_healthy_cluster(client, tmp_path):
    run = ["--config", "tiny", "--set", f"run_dir={tmp_path / 'run'}", "--address", client.address]
    # A process of its own: in this one Ray may have read another test's token.
    done = subprocess.run([sys.executable, "-m", "jobs.doctor", *run, "--json"], cwd=PROJECT, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    if facts.psutil.virtual_memory().available < 5 * GIB:
        pytest.skip("this machine is short of memory, and the doctor says so")
    assert [one for one in found if one["state"] == "fault"] == [], done.stderr
    assert done.returncode == 0
    values = {(one["what"], one["where"]): one["value"] for one in found}
    assert values["nodes", "the cluster"] == "1 of 1 told"
    assert values["tokens", f"the cluster ({client.address})"] == "refuses who has no token or a wrong one, and takes ours"
    assert sum(what == "storage" for what, _ in values) == 2  # as it is seen here, and there
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
    assert doctor.main([]) in (0, 1)
    said = capsys.readouterr().out
    assert "versions" in said
    assert f"{facts.socket.gethostname()}: " in said
    assert doctor.main(["--set", "name=x"]) == 2
