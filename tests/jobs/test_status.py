"""How far a run is, from files that stand for every state a stage can be in."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fabricated_cluster import publish, tiny

from jobs import status
from paris_ray import stages
from paris_ray.storage import Folder


@pytest.fixture
def run(tmp_path):
    config = tiny(tmp_path)
    for name in ("embed", "partition"):
        publish(config, name)
    publish(config, "expert-0", counts={"images": 320, "images_per_second": 41.5, "loss": 0.25, "restarts": 2, "goodput": 0.875})
    events, now = Folder(config.run_dir) / "events", time.time()
    common = {"unit": "images", "total": 320, "loss": 0.5, "message": ""}
    running = {**common, "state": "running", "rate": 16.0, "eta": 75.0}
    events.write_json("expert-0.json", {**running, "stage": "expert-0", "state": "done", "done": 320, "updated": now - 400})
    events.write_json("expert-1.json", {**running, "stage": "expert-1", "done": 160, "updated": now - 2})
    events.write_json("expert-2.json", {**running, "stage": "expert-2", "done": 80, "updated": now - 4000, "message": "restart 1, from image 80"})
    events.write_json("router.json", {**common, "stage": "router", "state": "failed", "done": 8, "rate": 0.0, "eta": None, "updated": now - 90,
                                      "message": "router: not a finite number at image 8"})  # fmt: skip
    return config


def arguments(config, *more):
    return ["--config", "tiny", "--set", f"run_dir={config.run_dir}", *more]


def test_every_state(run, capsys):
    assert status.main(arguments(run, "--json")) == 0
    found = {one["stage"]: one for one in map(json.loads, capsys.readouterr().out.splitlines())}
    assert {name: one["state"] for name, one in found.items() if not name.startswith(("control", "evaluate"))} == {
        "embed": "valid", "partition": "valid", "expert-0": "valid", "expert-1": "running", "expert-2": "silent", "router": "failed",
        "assemble": "waiting",
    }  # fmt: skip
    assert (found["expert-0"]["rate"], found["expert-0"]["loss"], found["expert-0"]["goodput"]) == (41.5, 0.25, 0.875)
    assert (found["expert-1"]["rate"], found["expert-1"]["eta"], found["expert-1"]["restarts"]) == (16.0, 75.0, None)
    assert found["expert-2"]["eta"] is None  # nobody knows


def test_who_was_asked_to_stop_is_stopped_however_long_ago(run, capsys):
    events = Folder(run.run_dir) / "events"
    events.write_json("expert-2.json", {**events.read_json("expert-2.json"), "state": "stopped", "message": "the same command goes on"})
    assert status.main(arguments(run, "--json")) == 0
    found = {one["stage"]: one for one in map(json.loads, capsys.readouterr().out.splitlines())}
    assert (found["expert-2"]["state"], found["expert-2"]["done"], found["expert-2"]["message"]) == ("stopped", 80, "the same command goes on")


def test_appended_rows_are_counted_and_versions_named(run, capsys):
    one = stages.stage(run, "embed")
    one.publish({"rows": 170, "listed": 183, "sizes": [10, 20, 30]}, after=one.status().manifest)
    (Folder(run.run_dir) / "events").write_json(
        "embed.json", {"stage": "embed", "state": "done", "done": 153, "total": 153, "unit": "rows", "updated": 1}
    )
    assert status.main(arguments(run)) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("embed"))
    assert lines[at].split()[1:5] == ["valid", "183", "/", "183"]
    assert lines[at + 1] == "    version 2, with the rows of 1 append"
    assert lines[at + 2].startswith("partition")
    assert lines[at + 3] == "    made from version 1 of 2 of corpus"
    Folder(run.run_dir).delete("experts/0/file.txt")
    assert status.main(arguments(run)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[next(i for i, line in enumerate(lines) if line.startswith("expert-0")) + 1] == "    expert-0: file.txt is missing"


def test_lines_for_people(run, capsys):
    assert status.main(arguments(run)) == 0
    lines = capsys.readouterr().out.splitlines()
    by_name = {line.split()[0]: line for line in lines}
    assert by_name["expert-0"].split()[1:] == ["valid", "320", "/", "320", "images", "41.5/s", "0.2500", "2", "88%", "6", "min", "40", "s", "ago"]
    assert "160 / 320 images" in by_name["expert-1"]
    assert "1 min 15 s" in by_name["expert-1"]
    assert "1 h 06 min ago" in by_name["expert-2"]
    assert "    restart 1, from image 80" in lines
    assert "    router: not a finite number at image 8" in lines


def test_experts_in_several_clusters(run, capsys):
    events, now = Folder(run.run_dir) / "events", time.time()
    (Folder(run.run_dir) / "experts" / "1").write_json("_attempts.json", {"attempts": 3})
    events.write_json("machines/expert-1.json", {"hours": 2.0, "cost": 7.5, "node": "a100-spot"})
    queued = json.loads(events.read_bytes("expert-2.json")) | {"state": "queued", "updated": now - 2, "eta": None, "message": "no room for 20 min"}
    events.write_json("expert-2.json", queued)
    more = ("--set", "clusters.eu.address=http://h:1", "--set", "experts.1.cluster=eu")
    assert status.main([*arguments(run), *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["stage", "state", "cluster", "node", "done"]
    row = next(line.split() for line in lines if line.startswith("expert-1"))
    assert " ".join(row) == "expert-1 running eu a100-spot 160 / 320 images 16.0/s 0.5000 1 min 15 s 2 7.50 2 s ago"
    row = next(line.split() for line in lines if line.startswith("expert-2"))
    assert row[:3] == ["expert-2", "queued", "here"]
    assert lines[lines.index(next(line for line in lines if line.startswith("expert-2"))) + 1] == "    no room for 20 min"


def test_who_waits_for_machines_says_for_what(run, capsys):
    events = Folder(run.run_dir) / "events"
    said = "waits for machines for 25 s: a worker asks for 1 CPU"
    waiting = {"state": "starting", "eta": None, "rate": 0.0, "message": said, "updated": time.time()}
    events.write_json("expert-2.json", {**events.read_json("expert-2.json"), **waiting})
    assert status.main(arguments(run)) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("expert-2"))
    assert lines[at].split()[1] == "starting"
    assert lines[at + 1] == f"    {said}"


def test_who_only_looks_is_not_asked_to_delete(run, capsys):
    for option in (["--rebuild", "embed"], ["--dry-run"]):
        with pytest.raises(SystemExit):
            status.main(arguments(run, *option))
        assert "usage: python -m jobs.status" in capsys.readouterr().err


def test_wrong_input_and_no_ray(run, capsys, tmp_path):
    assert status.main(["--config", str(tmp_path / "gone.yaml")]) == 2
    assert "gone.yaml" in capsys.readouterr().err
    code = "import sys; from jobs import status; status.main(sys.argv[1:]); print('ray' in sys.modules, 'torch' in sys.modules)"
    project = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code, *arguments(run)], capture_output=True, text=True, check=True, cwd=project)
    assert done.stdout.splitlines()[-1] == "False False"
