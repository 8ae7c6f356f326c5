"""Clusters that tell only in part, or not at all: what is known is told, and who did not answer is named.

Ray and the clusters are pretended; the doctor asks a real one in test_doctor.py.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from types import SimpleNamespace

import pytest
import ray
from doctor_facts import faults, healthy
from fabricated_cluster import tiny

from jobs import cli, doctor, facts, store_facts
from jobs.findings import Facts


class Pretended:
    """Ray with some nodes, of which some answer no question of a kind.

    Args:
        nodes: how many.
        hang: the numbers of nodes by the name of the question that they do not answer.
    """

    def __init__(self, nodes, hang):
        self.count, self.hang, self.end = nodes, hang, threading.Event()
        self.pool = concurrent.futures.ThreadPoolExecutor(4 * nodes)

    def nodes(self):
        one = {"Alive": True, "NodeManagerHostname": "host", "Resources": {"object_store_memory": 1 << 30}}
        return [{**one, "NodeID": f"{k:08d}" + "0" * 48} for k in range(self.count)]

    def remote(self, **_):
        return lambda kind: SimpleNamespace(options=lambda scheduling_strategy: SimpleNamespace(remote=lambda: self.actor(kind, scheduling_strategy)))

    def actor(self, kind, where):
        number, made = int(where.node_id[:8]), kind()

        def asked(name):
            def ask(*args):
                if number in self.hang.get(name, ()):
                    self.end.wait()
                return getattr(made, name)(*args)

            return SimpleNamespace(remote=lambda *args: self.pool.submit(ask, *args))

        return SimpleNamespace(facts=asked("facts"), now=asked("now"), store=asked("store"))

    def wait(self, asked, timeout):
        done, left = concurrent.futures.wait(asked, timeout, concurrent.futures.FIRST_COMPLETED)
        return [one for one in asked if one in done][:1], list(left)

    def get(self, one, timeout=None):
        try:
            return one.result(timeout)
        except concurrent.futures.TimeoutError:
            raise ray.exceptions.GetTimeoutError("Get timed out") from None


@pytest.fixture
def pretended(monkeypatch):
    """Makes Ray one with ``hang``, and returns what a job told and how long it took."""
    made = []
    monkeypatch.setattr(cli, "connect", lambda: None)
    monkeypatch.setattr(facts, "_scales", lambda: False)
    monkeypatch.setattr(facts, "node", healthy)
    monkeypatch.setattr(facts, "NODES_SECONDS", 1.0)
    monkeypatch.setattr(facts, "STORE_SECONDS", 1.0)
    monkeypatch.setattr(facts, "CLOCK_SECONDS", 0.2)

    def ask(hang, probe=None):
        made.append(Pretended(6, hang))
        for name in ("nodes", "remote", "wait", "get"):
            monkeypatch.setattr(ray, name, getattr(made[-1], name))
        lines = []
        before = time.monotonic()
        facts.cluster(lambda told: lines.append(f"{facts.MARK}{facts.json.dumps(told)}"), probe)
        return "\n".join(lines), time.monotonic() - before

    yield ask
    for one in made:
        one.end.set()
        one.pool.shutdown()


def test_nodes_that_do_not_answer_take_the_time_of_one(pretended):
    said, took = pretended({"facts": (0, 1, 3, 4, 5)})
    assert took < 3
    nodes = facts.heard(said)["nodes"]
    assert len(nodes) == 6
    silent = [one for one in faults(Facts(nodes={"the cluster": nodes}, address="http://h:8265", here=healthy())) if one.what == "nodes"]
    assert [one.where[:15] for one in silent] == [f"host (0000000{k})"[:15] for k in (0, 1, 3, 4, 5)]
    assert all("has not answered" in one.value for one in silent)


def test_all_that_a_job_asks_fits_in_its_time():
    assert facts.NODES_SECONDS + 2 * facts.STORE_SECONDS <= doctor.JOB_SECONDS - 120  # a job starts in less


def test_a_node_that_answers_and_falls_silent(pretended):
    said, took = pretended({"now": (2,)})
    assert took < 2
    assert {one["node"][5:15]: one.get("error") for one in facts.heard(said)["nodes"] if "error" in one} == {"(00000002)": "Get timed out"}


def test_a_node_that_does_not_come_back_from_the_store(pretended, tmp_path):
    said, took = pretended({"store": (4, 5)}, probe=(str(tmp_path), "", None))
    assert took < 3
    nodes = facts.heard(said)["nodes"]
    stores = {one["node"]: one["store"] for one in nodes}
    assert [one["error"] for one in stores.values()] == [None] * 4 + ["no answer in 1 s"] * 2
    assert sum(one["error"] is None and one["bytes"] == store_facts.PROBE_BYTES for one in stores.values()) == 1
    found = faults(Facts(nodes={"the cluster": nodes}, stores=stores, address="http://h:8265", here=healthy()))
    assert [(one.what, one.value) for one in found] == [("storage", "ask: no answer in 1 s")] * 2


class Slow:
    """A cluster with a job that does not come to its end."""

    python, runtime_env, name = "python", None, "here"

    def __init__(self, state, said):
        self.state, self.said, self.calls = state, said, []

    def call(self, function, *args, **_):
        self.calls.append(function)
        return self.said if function == "get_job_logs" else None

    def status(self, job):
        return self.state

    def end(self, job):
        self.calls.append("end")


def told(*nodes):
    return f"{facts.MARK}{facts.json.dumps({'nodes': list(nodes), 'scales': True})}\n"


def test_a_job_that_is_ended_has_told_what_it_knew(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "JOB_SECONDS", 0.0)
    waiting = [{"node": name, "error": "it has not answered in 120 s"} for name in ("a", "b")]
    slow = Slow("RUNNING", told(*waiting) + "a warning\n" + told(healthy(node="a")))
    monkeypatch.setattr(doctor.clusters, "here", lambda config, address: slow)
    found = doctor.gather(None, "http://127.0.0.1:1")
    assert "end" in slow.calls
    assert [one["node"] for one in found.nodes["the cluster"]] == ["a", "b"]
    assert found.scales == {"the cluster": True}
    said = {one.where: one.value for one in faults(found) if one.what == "nodes"}
    assert said == {"b": "it has not answered in 120 s", "the cluster": "the job that asks its nodes did not come to its end (RUNNING): a warning"}


def test_a_job_that_tells_nothing(monkeypatch):
    slow = Slow("FAILED", "Traceback\nModuleNotFoundError: No module named 'psutil'\n")
    monkeypatch.setattr(doctor.clusters, "here", lambda config, address: slow)
    found = doctor.gather(None, "http://127.0.0.1:1")
    assert found.nodes == {}
    assert "(FAILED): ModuleNotFoundError" in found.silent["the cluster"]
    assert doctor.ask(Slow("SUCCEEDED", told(healthy())), None)["lacks"] is None


@pytest.mark.parametrize("blocked", ["experts", "experts/1"])
def test_a_part_of_the_run_where_nobody_can_write(tmp_path, blocked):
    """An expert's folder belongs to its cluster: that it is none is found, and the rest is looked at all the same."""
    run = tmp_path / "run"
    (run / blocked).parent.mkdir(parents=True, exist_ok=True)
    (run / blocked).write_text("no folder")
    config = tiny(run, "experts=[{}, {cluster: eu}]", "clusters={eu: {address: 'http://127.0.0.1:1'}}")
    found = doctor.gather(config, None)
    assert found.stores["here"]["error"] is None
    (one,) = [one for one in faults(found) if one.what == "storage"]
    assert one.where == f"{run}/experts/1 from here, for eu"
    assert one.value.startswith("write: ")
    assert "move away the file" in one.remedy
    assert "eu" in found.silent
    assert [file.name for file in run.rglob("*")] == [one for one in ("experts", "1") if one in blocked]
