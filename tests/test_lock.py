"""The lock against processes that are really killed, stopped and cut off."""

from __future__ import annotations

import errno
import io
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
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
    owner = {"host": socket.gethostname(), "pid": me.pid, "started": me.create_time(), "token": "t", "what": "w", "renewed": time.time()}
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
    """Both saw the dead owner; the late one must not delete the lock of the one that was quicker, nor of an owner that was not dead after all."""
    folder = Folder(tmp_path)
    claim(folder, started=1000.0)
    late = Lock(folder, "late")
    late.token = "late"
    seen = late._owner(folder)
    assert seen is not None
    claim(folder, started=1000.0, renewed=time.time() + 1)
    late._break(seen)
    assert folder.exists("_lock.json")
    with Lock(folder, "quick"):
        late._break(seen)
        assert folder.read_json("_lock.json")["what"] == "quick"


def test_of_two_machines_of_one_name_neither_is_dead_for_the_other(shared: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its process it would be: there is none of that number here."""
    claim(shared, started=1000.0, boot="another")
    renewal = threading.Timer(0.6, claim, (shared,), {"started": 1000.0, "boot": "another"})
    renewal.start()
    with pytest.raises(LockedError):
        Lock(shared, "me").__enter__()
    renewal.join()


def test_an_owner_whose_clock_is_behind_lives(tmp_path: Path) -> None:
    """It renews its lock, though each time with a stamp older than a lease."""
    folder, old = Folder(tmp_path), lambda: {"host": "elsewhere", "renewed": time.time() - 200}
    claim(folder, **old())
    renewal = threading.Timer(0.6, lambda: claim(folder, **old()))
    renewal.start()
    with pytest.raises(LockedError, match="on elsewhere"):
        Lock(folder, "me").__enter__()
    renewal.join()


# -- losing it ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Tests in the background of a shell ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """A folder on a network's disk, as far as anybody knows."""
    monkeypatch.setattr(Folder, "is_shared", True)
    return Folder(tmp_path)


def test_who_lost_the_lock_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], interruptible: None
) -> None:
    monkeypatch.setattr(lock, "LEASE_SECONDS", 4.0)
    folder = Folder(tmp_path)
    with pytest.raises(KeyboardInterrupt), Lock(folder, "old"):  # noqa: PT012
        claim(folder, what="new")
        time.sleep(10)
    assert "old has lost its lock: new (process" in capfd.readouterr().err
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
        file = super()._open(path, mode, **options)
        return file if "w" in mode else io.BytesIO(file.getvalue())  # its parent's readers share one place in one file


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    """A folder in it, which holds nothing back yet."""
    fsspec.register_implementation("held", Held, clobber=True)
    monkeypatch.setattr(Held, "protocol", "held")
    monkeypatch.setattr(Held, "store", {})
    Held.go.set()
    yield Folder(f"held://bucket/{uuid.uuid4().hex}")  # what was held back arrives where nobody looks any more
    Held.go.set()


def test_who_cannot_renew_a_lock_in_a_store_is_interrupted_before_its_lease_ends(
    held: Folder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], interruptible: None
) -> None:
    """The renewal hangs for longer than the lease, and lands on the lock of another: then nobody must be writing for the first one."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 4.0)
    with pytest.raises(KeyboardInterrupt), Lock(held, "old"):  # noqa: PT012
        Held.go.clear()
        begun = time.monotonic()
        time.sleep(10)
    assert time.monotonic() - begun < 5  # and does not wait for the store
    assert "old has lost its lock: it could not be renewed for" in capfd.readouterr().err
    assert held.exists("_lock.json")  # which may be another's by now


def test_a_lock_in_a_store_is_renewed_and_given_back(held: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LEASE_SECONDS", 4.0)
    with Lock(held, "me"):
        first = held.read_json("_lock.json")["renewed"]
        time.sleep(3.0)
        assert held.read_json("_lock.json")["renewed"] > first + 1
    assert not held.exists("_lock.json")


@pytest.mark.parametrize("ours", [False, True], ids=["network", "own disk"])
def test_a_disk_that_hangs(ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruptible: None) -> None:
    """A network's disk may hang for one machine alone, and another takes the lock; on a disk of one's own the process tells."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 2.0)
    monkeypatch.setattr(Folder, "is_shared", not ours)
    folder, renew = Folder(tmp_path), Lock._renew
    monkeypatch.setattr(Lock, "_renew", lambda self: (time.sleep(3.5), renew(self))[1])
    if ours:
        with Lock(folder, "me"):
            time.sleep(3)
        return
    with pytest.raises(KeyboardInterrupt), Lock(folder, "me"):
        time.sleep(3)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_network_disk_without_locks(number: int, shared: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS without its lock server, Lustre as it comes: still a dead owner's lock is taken, renewed and given back."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 2.0)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    claim(shared, started=1000.0)
    with Lock(shared, "me"):
        time.sleep(2.5)
    assert not shared.exists("_lock.json")


SLEEPER = """
import signal, sys, time
from paris_ray import lock
from paris_ray.storage import Folder
Folder.is_shared = sys.argv[2] == "network"
signal.signal(signal.SIGINT, signal.default_int_handler)
now, ahead = lock._now, 0.0
lock._now = lambda: now() + ahead
with lock.Lock(Folder(sys.argv[1]), "the sleeper"):
    ahead = 600.0
    print("awake", flush=True)
    time.sleep(6)
    print("writes", flush=True)
"""


@pytest.mark.parametrize("disk", ["network", "own"])
def test_who_wakes_after_its_lease_writes_no_more(disk: str, tmp_path: Path) -> None:
    """At once, whatever a clock that has slept says; a night on one's own disk costs nobody his lock."""
    process = subprocess.run([sys.executable, "-c", SLEEPER, str(tmp_path), disk], capture_output=True, text=True, timeout=60, check=False)
    if disk == "own":
        assert (process.returncode, process.stdout) == (0, "awake\nwrites\n")
        return
    assert (process.returncode, process.stdout) == (lock.EXIT, "awake\n")
    assert re.search(r"has lost its lock, renewed 60\d s ago", process.stderr)


DEAF = """
import signal, sys, time
from paris_ray import lock
from paris_ray.storage import Folder
lock.LEASE_SECONDS = 2.0
signal.signal(signal.SIGINT, lambda *_: None)
folder = Folder(sys.argv[1])
with lock.Lock(folder, "the deaf"):
    folder.write_json("_lock.json", {"token": "x", "what": "another", "host": "h", "pid": 1, "renewed": time.time()})
    for _ in range(100):
        time.sleep(0.1)
    print("writes", flush=True)
"""


def test_who_does_not_stop_is_ended(tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, "-c", DEAF, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert (process.returncode, process.stdout) == (lock.EXIT, "")
    assert "the deaf has lost its lock: another (process 1 on h) has it now" in process.stderr
    assert Folder(tmp_path).read_json("_lock.json")["what"] == "another"


# -- in a store, which has no locks of its own ----------------------------------------------------------------------------


class Slow(Lock):
    """Takes its time between the look and the claim, as a store does that throttles."""

    by = 0.0

    def _claim(self) -> bytes:
        time.sleep(self.by)
        self.by = 0.0
        return super()._claim()


@pytest.mark.parametrize("dead", [False, True])
def test_a_late_claim_waits_for_who_it_may_have_written_over(dead: bool, held: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two see no owner, or a dead one; one claims at once and works, the other's claim lands over that one's: not both may work."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 6.0)
    lost: list[float] = []

    def lose(self: Lock, why: str) -> None:
        self._limit, self._leased = math.inf, False  # not its process, which is this one
        lost.append(time.monotonic())

    monkeypatch.setattr(Lock, "_lose", lose)
    if dead:
        claim(held, started=1000.0)
    late, began = Slow(held, "late"), []
    late.by = 2.0

    def take() -> None:
        with late:
            began.append(time.monotonic())

    thread = threading.Thread(target=take)
    thread.start()
    time.sleep(0.5)
    with Lock(held, "quick"):
        thread.join(20)
        assert len(lost) == 1
        assert began[0] > lost[0] + lock.LEASE_SECONDS / 16  # in which the other one ends


def test_a_claim_that_is_renewed_late_waits_anew(held: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have written over the claim of somebody who has begun meanwhile."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 2.0)
    ended: list[float] = []

    def renew(self: Lock, renew=Lock._renew) -> bool:
        if not ended:
            time.sleep(0.2)
        owned = bool(renew(self))
        ended.append(time.monotonic())
        return owned

    monkeypatch.setattr(Lock, "_renew", renew)
    one = Lock(held, "late")
    one.token, one._renewed = "t", lock._now()
    claim(held)
    assert one._settled(late=True)
    assert time.monotonic() - ended[0] >= lock.LEASE_SECONDS - 0.01


def test_of_many_that_claim_at_the_same_moment_one_works_at_a_time(held: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pauses of all lengths between look and claim; who loses its lock counts as gone when it must be."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 3.0)
    working: set[int] = set()
    together: list[set[int]] = []
    turns = []

    def lose(self: Lock, why: str) -> None:
        self._limit, self._leased = math.inf, False
        time.sleep(lock.LEASE_SECONDS / 16)
        working.discard(self.number)  # type: ignore[attr-defined]

    monkeypatch.setattr(Lock, "_lose", lose)
    claim(held, started=1000.0)
    draw = random.Random(5)
    pauses = [draw.uniform(0.0, 2.0) * lock._pause() for _ in range(12)]

    def take(number: int) -> None:
        one = Slow(held, str(number), wait=60)
        one.by, one.number = pauses[number], number  # type: ignore[attr-defined]
        with one:
            working.add(number)
            together.append(set(working))
            time.sleep(0.05)
            working.discard(number)
            turns.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(turns) == list(range(12))
    assert all(len(one) == 1 for one in together), together


def test_who_lost_the_lock_does_not_delete_the_new_owners(tmp_path: Path) -> None:
    with Lock(Folder(tmp_path), "old"):
        claim(Folder(tmp_path), what="new")
    assert Folder(tmp_path).read_json("_lock.json")["what"] == "new"
