"""What ran where and when: from a run whose history is written by hand, and from nodes as a head tells of them."""

from __future__ import annotations

import datetime
import xml.etree.ElementTree as ET

import pytest
from fabricated_cluster import FakeClient, on, publish, tiny

from jobs import timeline
from jobs.nodes import Nodes, read
from paris_ray.manifest import MANIFEST
from paris_ray.pages.timeline import axis
from paris_ray.storage import Folder

BEGAN = datetime.datetime(2026, 1, 2, 12, tzinfo=datetime.UTC).timestamp()


def node(name, start, end=None, why="", kind="a100", head=False):
    """As Ray's state API has it."""
    return {
        "node_id": name, "state": "ALIVE" if end is None else "DEAD", "is_head_node": head, "labels": {"ray.io/node-group": kind},
        "resources_total": {"CPU": 1.0}, "start_time_ms": 1000 * (BEGAN + start), "end_time_ms": 0 if end is None else 1000 * (BEGAN + end),
        "state_message": why or None,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """Embed for 40 s; expert 0 waits for 20 s, runs for 60 on a node that dies, waits for 30 and runs on; the first node is older than the run."""
    config = tiny(tmp_path)
    publish(config, "embed")
    for part in ("corpus", "encoders"):
        folder = Folder(config.run_dir) / part
        created = datetime.datetime.fromtimestamp(BEGAN + (40 if part == "corpus" else 10), datetime.UTC).isoformat(timespec="seconds")
        folder.write_json(MANIFEST, {**folder.read_json(MANIFEST), "created": created, "seconds": 30.0 if part == "corpus" else 10.0})
    spans = [(40, 60, None, []), (60, 120, "a100", ["n1"]), (120, 150, None, []), (150, 200, "a100", ["n2"])]
    bill = [{"from": BEGAN + a, "until": BEGAN + b, "node": kind, "ids": ids} for a, b, kind, ids in spans]
    (Folder(config.run_dir) / "events/machines").write_json("expert-0.json", {"hours": 1, "cost": None, "node": "a100", "spans": bill})
    client = FakeClient(config)
    client.list_nodes = lambda: [
        node("h", -500, head=True, kind="head"), node("old", -500, -400), node("cpu", -100, 50, "Expected termination: idle", kind="cpu"),
        node("n1", 55, 120, "Unexpected termination: health check failed"), node("n2", 145),
    ]  # fmt: skip
    Nodes(Folder(config.run_dir) / "events").keep([on(client)])
    return config


def test_the_times_of_stages_and_nodes(run):
    found = timeline.read(run)
    assert found.began == BEGAN
    assert [(bar.start, bar.end) for bar in found.stages["embed"]] == [(0, 40)]
    assert [(bar.start, bar.end, bar.kind) for bar in found.stages["expert-0"]] == [
        (40, 60, None), (60, 120, "a100"), (120, 150, None), (150, 200, "a100")
    ]  # fmt: skip
    assert {kind: [(bar.start, bar.end, bar.broken) for bar in bars] for kind, bars in found.nodes.items()} == {
        "a100": [(55, 120, True), (145, 200, False)], "cpu": [(0, 50, False)]
    }  # fmt: skip
    assert found.notes["expert-0"] == "1 restart"


def test_a_node_that_was_drained_did_not_die():
    assert timeline.died("Unexpected termination: health check failed")
    assert not timeline.died("the pod ends")
    # As a training's notice says it.
    assert not timeline.died("AWS will terminate this instance at 2026-11-26T00:00:00Z")
    assert not timeline.died("Google Cloud preempts this instance")
    assert not timeline.died("Azure: Preempt of this machine, not before now")


def test_text_and_picture(run, tmp_path, capsys):
    assert timeline.main(["--config", "tiny", "--set", f"run_dir={run.run_dir}", "--svg", str(tmp_path / "out.svg")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "node a100 55 s … 2 min 00 s (1 min 05 s) died: Unexpected termination: health check failed" in out
    assert "expert-0: 1 restart waits 40 s … 1 min 00 s (20 s) a100 1 min 00 s … 2 min 00 s (1 min 00 s)" in out
    root = ET.parse(tmp_path / "out.svg").getroot()
    name = "{http://www.w3.org/2000/svg}"
    bars = [one for one in root.iter(f"{name}rect") if one.find(f"{name}title") is not None]
    assert len(bars) == 3 + 1 + 4
    # As wide as they are long, and where they began: expert 0's runs of 60 and 50 s begin at 60 and 150.
    first, second = [one for one in bars if one.find(f"{name}title").text == "a100"]
    assert float(first.get("width")) / float(second.get("width")) == pytest.approx(60 / 50, abs=0.01)
    waits = [one for one in bars if one.get("fill") == "url(#waits)"]
    assert (float(second.get("x")) - float(first.get("x"))) / float(waits[0].get("width")) == pytest.approx(90 / 20, abs=0.01)
    assert [one.text for one in root.iter(f"{name}text")].count("✕") == 1


def test_nothing_yet(tmp_path, capsys):
    assert timeline.main(["--config", "tiny", "--set", f"run_dir={tmp_path}"]) == 2
    assert "nothing has run there yet" in capsys.readouterr().err


def test_a_head_that_was_started_anew_does_not_make_the_old_nodes_forgotten(tmp_path):
    config, events = tiny(tmp_path), Folder(tmp_path) / "events"
    client = FakeClient(config)
    client.list_nodes = lambda: [node("a", 0, 10)]
    Nodes(events).keep([on(client)])
    client.list_nodes = lambda: [node("b", 20)]
    again = Nodes(events)
    again.keep([on(client)])
    assert [(name, one["until"] and one["until"] - BEGAN) for name, one in read(events / "nodes", "here").items()] == [("a", 10), ("b", None)]
    client.list_nodes = lambda: [node("b", 20, 30)]
    again.keep([on(client)])
    assert read(events / "nodes", "here")["b"]["until"] == BEGAN + 30


@pytest.mark.parametrize(("end", "marks"), [(9.0, [0, 2, 4, 6, 8]), (100.0, [0, 15, 30, 45, 60, 75, 90]), (7300.0, [0, 1800, 3600, 5400, 7200])])
def test_round_marks(end, marks):
    assert axis(end) == marks
    assert len(axis(10**7)) <= 11
