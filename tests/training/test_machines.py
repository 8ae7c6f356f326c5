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

    def look(self, passed, scaling=None, **groups):
        self.now += passed
        self.one.look({name: (state, nodes) for name, (state, *nodes) in groups.items()}, NODES, FREE, scaling)

    def event(self):
        return machines.event(self.events, "expert-0")


def figures(events):
    """A bill without its history, and without what is waited for."""
    return {key: value for key, value in bill(events, "expert-0").items() if key not in ("spans", "wait")}


def test_hours_and_money_count_while_machines_are_held(tmp_path, monkeypatch):
    one = Watch(tmp_path, monkeypatch, num_workers=2, price_per_hour=3.0)
    one.events.write_json("expert-0.json", EVENT)
    one.look(100, g=("PENDING", "", ""))
    one.look(100, g=("PENDING", "", ""))
    assert figures(one.events) == {"hours": 0.0, "cost": None, "node": None}
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
    one.look(9, g=("PENDING", ""))
    assert one.event() == EVENT  # it may be there in a moment
    one.look(590, g=("PENDING", ""))
    what = "a worker asks for 16 CPU, label market=spot; the cluster has 1 × (4 CPU), 2 × (8 CPU, market=spot), free 3 of 20 CPU"
    event = one.event()
    assert (event["state"], event["message"], event["done"], event["rate"]) == ("starting", f"waits for machines for 9 min 59 s: {what}", 80, 0.0)
    capsys.readouterr()
    one.look(0)  # between two groups there is none
    one.look(1, g=("RESCHEDULING", ""))
    event = one.event()
    said = f"no room for 10 min 00 s: {what}"
    assert (event["state"], event["message"], event["done"], event["eta"]) == (QUEUED, said, 80, None)
    assert time.time() - event["updated"] < 60
    assert f"expert-0: {said}" in capsys.readouterr().out
    one.look(60, g=("PENDING", ""))
    assert one.event()["message"].startswith("no room for 11 min")
    assert capsys.readouterr().out == ""  # in the log once
    # The machines are there: nobody need end it, be its worker still to say its first word.
    one.look(5, g=("CREATED", "a"))
    event = one.event()
    assert (event["state"], event["message"], event["done"]) == ("starting", "", 80)
    said = {**EVENT, "updated": time.time()}
    one.events.write_json("expert-0.json", said)
    one.look(599, g=("PENDING", ""))
    one.look(9, g=("PENDING", ""))
    assert one.event() == said  # it counts anew, and its worker has said something since


def test_the_event_is_its_workers_alone(tmp_path, monkeypatch):
    """Read, changed and written by the driver it would lose what the worker says meanwhile."""
    one, written = Watch(tmp_path, monkeypatch, wait_minutes=1), []
    one.events.write_json("expert-0.json", EVENT)
    monkeypatch.setattr(Folder, "write_json", lambda self, name, value, write=Folder.write_json: (written.append(name), write(self, name, value)))
    for passed, state in ((0, "PENDING"), (30, "PENDING"), (60, "PENDING"), (3, "CREATED"), (3, "CREATED")):
        one.look(passed, g=(state, "a"))
    assert set(written) == {"machines/expert-0.json"}
    # What is waited for is worth less than what the worker has said since.
    later = {**EVENT, "updated": time.time() + 1, "done": 160}
    one.events.write_json("expert-0.json", later)
    assert one.event() == later
    with pytest.raises(FileNotFoundError):
        machines.event(one.events, "expert-1")


def test_when_it_waited_and_what_it_held(tmp_path, monkeypatch):
    one = Watch(tmp_path, monkeypatch)
    one.events.write_json("expert-0.json", EVENT)
    monkeypatch.setattr(machines.time, "time", lambda: one.now + 5000)
    for passed, group in ((3, ("PENDING", "")), (3, ("PENDING", "")), (3, ("CREATED", "c")), (60, ("CREATED", "c")), (3, ("RESCHEDULING", "")),
                          (30, ("RESCHEDULING", "")), (3, ("CREATED", "a"))):  # fmt: skip
        one.look(passed, g=group)
    again = Watch(tmp_path, monkeypatch)  # another driver
    again.now = one.now + 100
    monkeypatch.setattr(machines.time, "time", lambda: again.now + 5000)
    again.one = Machines(again.events, "expert-0", Resources())
    again.look(3, g=("CREATED", "a"))
    spans = [(span["from"] - 6000, span["until"] - 6000, span["node"], span["ids"]) for span in bill(one.events, "expert-0")["spans"]]
    assert spans == [
        (0, 6, None, []), (6, 69, "4 CPU", ["c"]), (69, 102, None, []), (102, 105, "8 CPU", ["a"]), (205, 208, "8 CPU", ["a"])
    ]  # fmt: skip


def test_a_look_writes_once(tmp_path, monkeypatch):
    """A store takes money for each write, and the driver looks every few seconds."""
    one = Watch(tmp_path, monkeypatch)
    one.events.write_json("expert-0.json", EVENT)
    written = []
    monkeypatch.setattr(Machines, "_write", lambda self, write=Machines._write: (written.append(one.now), write(self)))
    for _ in range(40):
        one.look(15, g=("PENDING", ""))
    assert len(written) == len(set(written)) == 40
    one.look(15, g=("CREATED", "a"))
    assert [span["ids"] for span in bill(one.events, "expert-0")["spans"]] == [[], ["a"]]


def scaling():
    """An autoscaler that wants three nodes of a kind, has failed with another before and since, and knows nothing for one group."""
    from ray.core.generated.autoscaler_pb2 import AutoscalingState

    state = AutoscalingState()
    state.pending_instance_requests.add(ray_node_type_name="t4", count=2)
    state.pending_instances.add(ray_node_type_name="t4")
    noise = "launch failed with Failed to launch 1 nodes of type a100 with request id 3f: "
    state.failed_instance_requests.add(ray_node_type_name="a100", count=3, reason="of long ago", failed_ts=100)
    state.failed_instance_requests.add(ray_node_type_name="a100", count=1, reason=f"{noise}no capacity in zone b", failed_ts=2000)
    state.failed_instance_requests.add(ray_node_type_name="a100", count=1, reason=f"{noise}no capacity in zone a", failed_ts=1900)
    state.failed_instance_requests.add(ray_node_type_name="h100", count=1, reason=noise, failed_ts=1900)
    state.infeasible_gang_resource_requests.add(details="77:PACK|PENDING")
    return state


def test_what_an_autoscaler_is_about():
    said = (
        "the autoscaler has asked for 2 × t4; it is starting 1 × t4; it could not start a100, 2 times so far (no capacity in zone b); "
        "it could not start h100, 1 time so far (the head's monitor.log has the cloud's answer)"
    )
    assert machines.scaler(scaling(), ["88"], 1000.0) == said
    assert machines.scaler(scaling(), ["77"], 1000.0) == f"{said}; it knows no kind of node that would do, or may start no more of it"
    assert machines.scaler(type(scaling())(), ["77"], 0.0) == machines.scaler(None, ["77"], 0.0) == ""


def test_who_waits_says_what_the_autoscaler_does(tmp_path, monkeypatch):
    one = Watch(tmp_path, monkeypatch, wait_minutes=1)
    monkeypatch.setattr(machines.time, "time", lambda: one.now)
    one.events.write_json("expert-0.json", EVENT)
    one.look(0, g_77=("PENDING", ""))
    one.look(20, scaling(), g_77=("PENDING", ""))
    assert (
        "free 3 of 20 CPU; the autoscaler has asked for 2 × t4; it is starting 1 × t4; it could not start a100, 2 times so far ("
        in one.event()["message"]
    )
    one.look(60, scaling(), g_77=("PENDING", ""))
    assert one.event()["state"] == QUEUED


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
