"""The lock against processes that are really killed, stopped and cut off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import psutil
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from paris_ray import lock
from paris_ray.lock import Lock, LockedError
from paris_ray.storage import Folder

HOLD = """
import sys, time
from paris_ray.lock import Lock
from paris_ray.storage import Folder
with Lock(Folder(sys.argv[1]), "the other"):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_live_owner_is_respected_and_a_killed_one_is_not(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        with pytest.raises(LockedError, match=rf"written by the other \(process {process.pid} on "):
            Lock(Folder(tmp_path), "me").__enter__()
        os.kill(process.pid, signal.SIGKILL)
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:  # dead, and nobody has asked how
            time.sleep(0.01)
        assert Folder(tmp_path).exists("_lock.json")  # nobody cleaned up
        with Lock(Folder(tmp_path), "me"):
            assert Folder(tmp_path).read_json("_lock.json")["what"] == "me"
        assert not Folder(tmp_path).exists("_lock.json")
    finally:
        process.kill()
        process.wait()


def test_waiting_for_an_owner_to_go(tmp_path: Path) -> None:
    first = Lock(Folder(tmp_path), "first")
    first.__enter__()
    threading.Timer(0.6, first.__exit__, (None, None, None)).start()
    begun = time.monotonic()
    with Lock(Folder(tmp_path), "second", wait=20):
        assert time.monotonic() - begun > 0.5


def claim(folder: Folder, **changes: object) -> None:
    me = psutil.Process()
    owner = {"host": lock.socket.gethostname(), "pid": me.pid, "started": me.create_time(), "token": "t", "what": "w", "renewed": time.time()}
    folder.write_json("_lock.json", {**owner, **changes})


def test_a_new_process_with_the_dead_owners_id_is_not_the_owner(tmp_path: Path) -> None:
    claim(Folder(tmp_path), started=1000.0)
    with Lock(Folder(tmp_path), "me"):
        pass


def test_owners_elsewhere_live_by_their_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path)
    claim(folder, host="elsewhere", pid=1)
    renewal = threading.Timer(0.6, claim, (folder,), {"host": "elsewhere", "pid": 1})
    renewal.start()
    with pytest.raises(LockedError, match="on elsewhere"):
        Lock(folder, "me").__enter__()
    renewal.join()
    # One that does not renew is waited for until its lease ends, and no longer.
    monkeypatch.setattr(lock, "LEASE_SECONDS", 1.0)
    claim(folder, host="elsewhere", pid=1)
    begun = time.monotonic()
    with Lock(folder, "me"):
        assert time.monotonic() - begun > 0.5
    claim(folder, host="elsewhere", pid=1, renewed=time.time() - 2)
    with Lock(folder, "me"):
        pass


def test_a_torn_lock_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / "_lock.json").write_bytes(b"")
    with Lock(Folder(tmp_path), "me"):
        assert Folder(tmp_path).read_json("_lock.json")["what"] == "me"


RACE = """
import sys, time
from paris_ray.lock import Lock, LockedError
from paris_ray.storage import Folder
folder = Folder(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    with Lock(folder, sys.argv[2]):
        print("won", flush=True)
        sys.stdin.readline()
except LockedError:
    print("lost", flush=True)
"""


@pytest.mark.parametrize("abandoned", [False, True])
def test_of_simultaneous_owners_exactly_one_wins(tmp_path: Path, abandoned: bool) -> None:
    if abandoned:
        claim(Folder(tmp_path), started=1000.0)
    racers = [
        subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path), f"racer {i}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for i in range(4)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    results = sorted(racer.stdout.readline().strip() for racer in racers if racer.stdout)
    for racer in racers:
        racer.communicate("\n")
    assert results == ["lost", "lost", "lost", "won"]
    assert not Folder(tmp_path).exists("_lock.json")


def test_an_owner_that_took_a_dead_lock_keeps_it_when_another_is_late(tmp_path: Path) -> None:
    """Both saw the dead owner; the late one must not delete the lock of the one that was quicker."""
    folder = Folder(tmp_path)
    claim(folder, started=1000.0)
    late = Lock(folder, "late")
    late.token = "late"
    seen = late._owner()
    assert seen is not None
    with Lock(folder, "quick"):
        late._break(seen)
        assert folder.read_json("_lock.json")["what"] == "quick"


def test_who_lost_the_lock_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.4)
    folder = Folder(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt), Lock(folder, "old"):  # noqa: PT012
        claim(folder, what="new")
        time.sleep(10)
    assert "old has lost its lock, now new" in capsys.readouterr().err
    assert folder.read_json("_lock.json")["what"] == "new"


class Held(MemoryFileSystem):
    """A store in memory that holds back what is written, while it is told to."""

    store: dict = {}  # noqa: RUF012, as its parent has it
    pseudo_dirs = [""]  # noqa: RUF012
    cachable = False
    go = threading.Event()

    def _open(self, path, mode="rb", **options):
        if "w" in mode:
            self.go.wait(20)
        return super()._open(path, mode, **options)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    """A folder in it, which holds nothing back yet."""
    fsspec.register_implementation("held", Held, clobber=True)
    monkeypatch.setattr(Held, "protocol", "held")
    monkeypatch.setattr(Held, "store", {})
    Held.go.set()
    yield Folder("held://bucket/run")
    Held.go.set()


def test_who_cannot_renew_a_lock_in_a_store_is_interrupted_before_its_lease_ends(
    held: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """The renewal hangs for longer than the lease, and lands on the lock of another: then nobody must be writing for the first one."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 2.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Lock(held, "old"):  # noqa: PT012
        Held.go.clear()
        time.sleep(10)
    assert time.monotonic() - begun < 5  # and does not wait for the store
    assert "old has lost its lock: it could not be renewed for" in capsys.readouterr().err
    assert held.exists("_lock.json")  # which may be another's by now


def test_a_lock_in_a_store_is_renewed_and_given_back(held: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LEASE_SECONDS", 1.0)
    with Lock(held, "me"):
        first = held.read_json("_lock.json")["renewed"]
        time.sleep(1.5)
        assert held.read_json("_lock.json")["renewed"] > first + 1
    assert not held.exists("_lock.json")


def test_who_lost_the_lock_does_not_delete_the_new_owners(tmp_path: Path) -> None:
    with Lock(Folder(tmp_path), "old"):
        claim(Folder(tmp_path), what="new")
    assert Folder(tmp_path).read_json("_lock.json")["what"] == "new"
