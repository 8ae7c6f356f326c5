"""The follower's table: nothing cut, nothing wiped by half; and the time to go, against the rule worked out by hand."""

from __future__ import annotations

import os
import time

import pytest
from fabricated_cluster import FakeClient, on, publish, tiny

from jobs import board, runner
from jobs.board import Board, describe, table
from jobs.forecast import training_to_go
from jobs.runner import Runner
from paris_ray import stages
from paris_ray.storage import Folder


def event(done, total, rate, **more):
    return {"done": done, "total": total, "rate": rate, "state": "running", "unit": "images", "eta": None, "loss": None, "message": "", **more}


def test_a_long_line_goes_on_below_and_loses_no_word():
    note = "restart 1, from image 4800"
    text = describe("expert-0", event(5104, 20080, 77.8, eta=193, loss=1.0349, message=note), 100)
    lines = table("[3 min 05 s] 4 of 12 stages done, about 9 min 20 s of training to go", [("expert-0", text)], 79)
    assert max(map(len, lines)) <= 79
    assert len(lines) == 3
    assert lines[1].startswith("  expert-0        5104/20080 images (25 %), 78/s, 3 min 13 s to go")
    assert " ".join(" ".join(lines[1:]).split()).removeprefix("expert-0 ") == text
    assert note in text


def test_a_start_says_for_how_long_and_why():
    assert describe("expert-3", None, 12.4) == "starting for 12 s (Ray Train takes 15–30 s, once what the stage asks for is free)"
    assert describe("partition", None, 3.0) == "starting for 3 s"


def test_who_waits_for_machines_says_so_and_who_only_starts_does_not(tmp_path):
    folder, one = Folder(tmp_path), Board(Folder(tmp_path))
    folder.write_json("expert-0.json", event(0, 100, 0.0, state="starting", updated=time.time()))
    assert one.event("expert-0", 0.0) is None
    folder.write_json("expert-0.json", event(0, 100, 0.0, state="starting", message="waits for machines for 25 s", updated=time.time()))
    assert describe("expert-0", one.event("expert-0", 0.0), 30.0) == "waits for machines for 25 s"


def test_the_table_on_a_terminal_rewrites_itself_whole(tmp_path, monkeypatch, capsys):
    folder = Folder(tmp_path)
    folder.write_json("expert-0.json", event(50, 100, 5.0, updated=time.time(), message="a note that is much too long for a line of forty letters"))
    folder.write_json("expert-1.json", event(50, 100, 5.0, updated=time.time() - 100))  # of an earlier attempt
    one = Board(folder)
    one.terminal = True
    monkeypatch.setattr(board, "TABLE_SECONDS", 0.0)
    monkeypatch.setattr(board.shutil, "get_terminal_size", lambda: os.terminal_size((40, 24)))
    running = {"expert-0": time.time() - 10, "expert-1": time.time() - 10}
    one.show(1, 12, running, lambda events: 75.0 if events["expert-0"] and not events["expert-1"] else None)
    first = capsys.readouterr().out
    assert max(map(len, first.splitlines())) < 40
    assert "about 1 min 15 s of training to" in " ".join(first.split())
    assert "starting for 10 s" in " ".join(first.split())
    one.show(1, 12, running)
    # Up by as many lines as were drawn.
    assert capsys.readouterr().out.startswith(f"\x1b[{len(first.splitlines())}F\x1b[J")


def test_stages_are_counted_over_the_whole_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.0)
    config = tiny(tmp_path)
    count = len(stages.names(config))
    for name in stages.names(config)[:-1]:
        publish(config, name)
    one = Runner(config, on(FakeClient(config)), planned=[*stages.names(config), "evaluate"])
    shown = []
    monkeypatch.setattr(one.board, "show", lambda done, total, *rest: shown.append((done, total)))
    assert one.run(["assemble"])
    assert set(shown) == {(count - 1, count + 1)}
    shown.clear()
    assert one.run(["evaluate"])
    assert set(shown) == {(count, count + 1)}


# -- time to go ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    """Three experts alike and two routers of a quarter of their weights, 320 images each."""
    return tiny(tmp_path, "experts=3", "router.model.hidden_size=16")


TRAININGS = ["expert-0", "expert-1", "expert-2", "router", "control_router"]


def test_what_is_left_at_the_speed_of_those_that_run(config):
    # An expert's image is 2 × 32² = 2048 of work, a router's 1 × 16² = 256.
    running = {"expert-0": event(120, 320, 10.0), "expert-1": event(220, 320, 20.0)}
    left = 200 * 2048 + 100 * 2048 + 320 * 2048 + 2 * 320 * 256
    speed = (10 + 20) / 2 * 2048
    assert training_to_go(config, [*TRAININGS, "assemble"], running) == pytest.approx(left / (2 * speed))
    # One that has not said anything yet takes a place and counts whole.
    running = {"expert-0": event(260, 320, 10.0), "expert-1": event(260, 320, 20.0), "router": None}
    left = 2 * 60 * 2048 + 2 * 320 * 256
    assert training_to_go(config, ["expert-0", "expert-1", "router", "control_router"], running) == pytest.approx(left / (3 * speed))


def test_the_run_is_as_long_as_its_longest_training(config):
    running = {"expert-0": event(0, 320, 10.0), "router": event(300, 320, 80.0)}
    assert training_to_go(config, ["expert-0", "router"], running) == pytest.approx(320 * 2048 / ((10 * 2048 + 80 * 256) / 2))


def test_what_nobody_can_know_is_not_said(config):
    assert training_to_go(config, ["partition", *TRAININGS], {"partition": event(5, 10, 1.0)}) is None
    assert training_to_go(config, TRAININGS, {"expert-0": event(5, 320, 0.0)}) is None
    assert training_to_go(config, ["assemble"], {"assemble": None}) is None
