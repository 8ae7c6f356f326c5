"""How long a stage was at work: over drivers that end, fail and are killed."""

from __future__ import annotations

import pytest

from paris_ray.storage import Folder
from paris_ray.training import wall
from paris_ray.training.wall import Wall, last_sign


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(wall.time, "time", lambda: now[0])
    return now


def test_drivers_add_up_and_pauses_do_not(tmp_path, clock):
    stage, events = Folder(tmp_path / "stage"), Folder(tmp_path / "events")

    def fails_after_30_seconds():
        with Wall(stage, last_sign(events, "expert-1")):  # no sign of life yet
            clock[0] += 30
            raise KeyError

    with pytest.raises(KeyError):
        fails_after_30_seconds()
    clock[0] += 10_000
    killed = Wall(stage, last_sign(events, "expert-1"))
    clock[0] += 50
    events.write_json("expert-1.json", {"updated": clock[0]})
    assert killed.seconds == 80
    clock[0] += 20_000  # nobody knows when it was killed, but its last sign is known
    with Wall(stage, last_sign(events, "expert-1")) as last:
        clock[0] += 20
    clock[0] += 500
    assert last.seconds == 30 + 50 + 20


def test_damaged_files_count_for_nothing(tmp_path, clock):
    stage = Folder(tmp_path)
    stage.write_bytes("_wall.json", b"[")
    stage.write_bytes("expert-1.json", b"{}")
    assert last_sign(stage, "expert-1") == 0.0
    with Wall(stage, 0.0) as one:
        clock[0] += 5
    assert one.seconds == 5
