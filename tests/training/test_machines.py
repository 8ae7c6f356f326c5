"""What a training waits for, holds and pays: by hand over a clock that is set, and how it stops when it is asked to."""

from __future__ import annotations

import time

import fake_training_run as fake
import pytest
import torch

from paris_ray.resources import Resources
from paris_ray.storage import Folder
from paris_ray.training import machines, stopping, termination, worker
from paris_ray.training.loop import Place
from paris_ray.training.machines import QUEUED, Machines, bill


def node(name, cpus, alive=True, **labels):
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": float(cpus), "memory": 1e9}, "Labels": {"ray.io/node-id": name, **labels}}


NODES = [node("a", 8, market="spot"), node("b", 8, market="spot"), node("c", 4), node("d", 64, alive=False)]
FREE = {"CPU": 3.0, "memory": 1e9}
EVENT = {"state": "running", "done": 80, "total": 320, "unit": "images", "rate": 2.0, "eta": 9.0, "loss": 0.5, "message": "", "updated": 0.0}


class Watch:
    """A watcher whose clock is set."""

    def __init__(self, folder, monkeypatch, **asked):
        self.now = 1000.0
        monkeypatch.setattr(machines.time, "monotonic", lambda: self.now)
        self.events = Folder(folder)
        self.one = Machines(self.events, "expert-0", Resources(**asked))

    def look(self, passed, **groups):
        self.now += passed
        self.one.look({name: (state, nodes) for name, (state, *nodes) in groups.items()}, NODES, FREE)


def test_hours_and_money_count_while_machines_are_held(tmp_path, monkeypatch):
    one = Watch(tmp_path, monkeypatch, num_workers=2, price_per_hour=3.0)
    one.look(100, g=("PENDING", "", ""))
    one.look(100, g=("PENDING", "", ""))
    assert bill(one.events, "expert-0") == {"hours": 0.0, "cost": None, "node": None}
    for _ in range(6):
        one.look(60, g=("CREATED", "a", "c"))
    found = bill(one.events, "expert-0")
    # Two workers for six minutes.
    assert (found["hours"], found["cost"]) == (pytest.approx(0.2), pytest.approx(0.6))
    assert found["node"] == "4 CPU, 8 CPU"
    # Another start adds to it; one without a price adds hours only.
    again = Watch(tmp_path, monkeypatch)
    again.look(3600, g=("CREATED", "b"))
    found = bill(one.events, "expert-0")
    assert (found["hours"], found["cost"], found["node"]) == (pytest.approx(1.2), pytest.approx(0.6), "8 CPU")


def test_a_store_that_is_away_does_not_reset_the_bill(tmp_path, monkeypatch):
    before = {"hours": 10.0, "cost": 40.0, "node": "A100"}
    (Folder(tmp_path) / "machines").write_json("expert-0.json", before)

    def lost(*_):
        raise ConnectionResetError("lost")

    with pytest.MonkeyPatch.context() as away:
        away.setattr(Folder, "read_json", lost)
        one = Watch(tmp_path, monkeypatch, price_per_hour=4.0)
        with pytest.raises(ConnectionResetError):  # the thread goes on after it
            one.look(1800, g=("CREATED", "a"))
    assert bill(one.events, "expert-0") == before
    one.look(1800, g=("CREATED", "a"))
    found = bill(one.events, "expert-0")
    assert (found["hours"], found["cost"]) == (pytest.approx(11.0), pytest.approx(44.0))


def test_what_cannot_be_looked_at_is_said_once(tmp_path, monkeypatch, capsys):
    looks = []

    def away():
        looks.append(1)
        raise ConnectionResetError("lost")

    monkeypatch.setattr(machines, "_see", away)
    monkeypatch.setattr(machines, "EVERY_S", 0.01)
    with Machines(Folder(tmp_path), "expert-0", Resources()):
        while len(looks) < 4:
            time.sleep(0.01)
    said = capsys.readouterr().out
    assert said == "expert-0: what it waits for and costs is not written down for now (ConnectionResetError: lost)\n"


def test_what_has_no_room_for_long_says_so(tmp_path, monkeypatch, capsys):
    one = Watch(tmp_path, monkeypatch, cpus=16, labels={"market": "spot"}, wait_minutes=10)
    one.events.write_json("expert-0.json", EVENT)
    one.look(0, g=("PENDING", ""))
    one.look(599, g=("PENDING", ""))
    assert one.events.read_json("expert-0.json") == EVENT
    one.look(0)  # between two groups there is none
    one.look(1, g=("RESCHEDULING", ""))
    event = one.events.read_json("expert-0.json")
    said = (
        "no room for 10 min 00 s: a worker asks for 16 CPU, label market=spot; "
        "the cluster has 1 × (4 CPU), 2 × (8 CPU, market=spot), free 3 of 20 CPU"
    )
    assert (event["state"], event["message"], event["done"], event["eta"]) == (QUEUED, said, 80, None)
    assert time.time() - event["updated"] < 60
    assert f"expert-0: {said}" in capsys.readouterr().out
    one.look(60, g=("PENDING", ""))
    assert one.events.read_json("expert-0.json")["message"].startswith("no room for 11 min")
    assert capsys.readouterr().out == ""  # in the log once
    # The machines are there: nobody need end it, be its worker still to say its first word.
    one.look(5, g=("CREATED", "a"))
    event = one.events.read_json("expert-0.json")
    assert (event["state"], event["message"], event["done"]) == ("starting", "", 80)
    one.look(599, g=("PENDING", ""))
    one.events.write_json("expert-0.json", EVENT)
    one.look(599, g=("PENDING", ""))
    assert one.events.read_json("expert-0.json") == EVENT  # it counts anew


@pytest.mark.parametrize(
    ("labels", "resources", "name"),
    [
        ({"ray.io/node-group": "a100-spot", "ray.io/accelerator-type": "A100"}, {"CPU": 8}, "a100-spot"),
        ({"ray.io/accelerator-type": "A100"}, {"CPU": 8}, "A100"),
        ({}, {"CPU": 8, "GPU": 1, "accelerator_type:H100": 1}, "H100"),
        ({}, {"CPU": 8}, "8 CPU"),
    ],
)
def test_kinds_of_nodes(labels, resources, name):
    assert machines.kind({"Labels": labels, "Resources": resources}) == name


def test_of_two_that_ask_the_nearer_end_counts(monkeypatch):
    monkeypatch.setattr(termination, "_asked", type(termination._asked)())
    monkeypatch.setattr(termination, "_ends", [])
    monkeypatch.setattr(termination.time, "monotonic", lambda: now[0])
    now = [1000.0]
    assert termination.seconds_left() == termination.GRACE_S  # asked by another worker
    termination.ask(600)
    termination.ask(120)
    termination.ask(600)
    now[0] += 20
    assert termination.seconds_left() == 100
    now[0] += 200
    assert termination.seconds_left() == 0


def test_a_training_that_is_asked_to_stop_leaves_a_checkpoint_where_it_is(tmp_path, monkeypatch):
    """As in a worker, without Ray."""
    config = fake.make_run(tmp_path, expert__train__images=8000, expert__train__checkpoint_images=8000)
    events, stage = Folder(config.run_dir) / "events", Folder(config.run_dir) / "experts" / "1"
    monkeypatch.setattr(termination, "_asked", type(termination._asked)())
    monkeypatch.setattr(stopping, "EVERY_S", 0.05)

    with stopping.Listener(events, "expert-1", termination.ask) as listener:
        assert not listener.wished()
        stopping.wish(events, "expert-1")
        with pytest.raises(termination.TerminatedError):
            worker.run(config, "expert-1", Place(torch.device("cpu")))
        assert listener.wished()
    (left,) = (stage / "checkpoints").folders()
    assert 0 < int(left.removeprefix("images-")) < 8000
    stopping.withdraw(events, "expert-1")
    assert not listener.wished()
