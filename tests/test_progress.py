"""Progress: what a follower reads, how often it is written, and that a missing store does not stop the work."""

from __future__ import annotations

import math

import pytest

from paris_ray import progress as module
from paris_ray.progress import Progress, clock, counted
from paris_ray.storage import Folder


class Clock:
    """Time that moves when told."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


@pytest.fixture
def ticking(monkeypatch):
    return Clock(monkeypatch)


def test_rate_and_eta_are_those_of_the_last_half_minute(tmp_path, ticking):
    progress = Progress(Folder(tmp_path), "expert-0", total=10_000)
    done = 4000  # resumed: what an earlier attempt did is no speed
    for second in range(200):
        ticking.now += 1
        done += 10 if second < 100 else 40
        progress.update(done, loss=0.5)
    event = Folder(tmp_path).read_json("expert-0.json")
    assert event["rate"] == pytest.approx(40.0)
    assert event["eta"] == pytest.approx((10_000 - done) / 40.0)
    assert event["state"] == "running"
    assert event["done"] == done
    assert event["loss"] == 0.5
    assert set(event) == {"stage", "state", "done", "total", "unit", "rate", "eta", "loss", "message", "updated"}


def test_a_slow_start_is_no_rate(tmp_path, ticking):
    progress = Progress(Folder(tmp_path), "embed", total=120, unit="rows")
    progress.update(0, message="encoding", force=True)
    ticking.now += 20  # workers load their encoders
    progress.update(10)
    assert progress.eta is None
    ticking.now += 2
    progress.update(20)
    assert progress.eta == pytest.approx((120 - 20) / 5.0)


def test_written_once_a_second_and_printed_every_five(tmp_path, ticking, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(Folder, "write_json", lambda self, name, value: written.append(value))
    progress = Progress(Folder(tmp_path), "embed", total=0, unit="rows")
    for _ in range(1000):
        ticking.now += 0.02
        progress.update(1)
    assert 1 + 19 <= len(written) <= 1 + 21
    assert 3 <= len(capsys.readouterr().err.splitlines()) <= 5
    assert written[0]["state"] == "starting"
    assert written[-1]["eta"] is None
    progress.update(2, force=True)
    assert written[-1]["done"] == 2


def test_ends_are_said_at_once(tmp_path, capsys):
    progress = Progress(Folder(tmp_path), "router", total=4)
    progress.update(4, loss=math.nan)
    progress.finish()
    event = Folder(tmp_path).read_json("router.json")
    assert (event["state"], event["loss"]) == ("done", None)
    progress.fail("out of memory")
    event = Folder(tmp_path).read_json("router.json")
    assert (event["state"], event["message"]) == ("failed", "out of memory")
    assert "out of memory, failed" in capsys.readouterr().err


def test_an_error_is_said_once_by_whom_it_reaches(tmp_path, capsys):
    progress = Progress(Folder(tmp_path), "embed", total=153, unit="rows")
    with pytest.raises(ValueError, match="no picture"), progress:
        raise ValueError("no picture")
    assert Folder(tmp_path).read_json("embed.json")["message"] == "ValueError: no picture"
    assert capsys.readouterr().err.splitlines()[-1] == "embed: 0 / 153 rows, failed"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_who_is_asked_to_stop_has_not_failed(tmp_path, capsys, error):
    progress = Progress(Folder(tmp_path), "embed", total=153, unit="rows")
    progress.update(120)
    with pytest.raises(error), progress:
        raise error(143)
    assert Folder(tmp_path).read_json("embed.json")["state"] == "stopped"
    assert capsys.readouterr().err.splitlines()[-1] == "embed: stopped at 120 of 153 rows; the same command goes on"


def test_a_store_that_is_away_costs_an_update_not_the_work(tmp_path, monkeypatch, capsys):
    progress = Progress(Folder(tmp_path), "expert-1", total=4)

    def away(self, name, value):
        raise OSError("connection reset")

    monkeypatch.setattr(Folder, "write_json", away)
    progress.update(1, force=True)
    assert "connection reset" in capsys.readouterr().err
    monkeypatch.undo()
    progress.update(2, force=True)
    assert Folder(tmp_path).read_json("expert-1.json")["done"] == 2


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"), (7620, "2 h 07 min")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_one_is_not_many():
    assert [counted(n, "restart") for n in (0, 1, 2)] == ["0 restarts", "1 restart", "2 restarts"]
