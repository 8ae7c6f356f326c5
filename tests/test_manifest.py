"""Every state of a stage's folder, and the lock against processes that are really killed."""

from __future__ import annotations

import hashlib
import json
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

from paris_ray import manifest
from paris_ray.manifest import Lock, LockedError, Stage, StaleError, damage, differences, fingerprint, require
from paris_ray.storage import Folder


def stage(path: Path, lr: float = 0.1, parent: str = "abc") -> Stage:
    return Stage("expert-0", Folder(path / "s"), {"train": {"lr": lr, "batch": 4}}, {"shard": parent})


def publish(path: Path) -> Stage:
    one = stage(path)
    one.begin()
    one.folder.write_bytes("a.bin", b"12345")
    one.folder.write_bytes("sub/b.bin", b"678")
    one.folder.write_json("_lock.json", {})
    one.publish({"rows": 3}, seconds=1.5)
    return one


def test_absent_partial_valid(tmp_path: Path) -> None:
    one = stage(tmp_path)
    assert one.status().state == "absent"
    assert one.begin().state == "absent"
    assert one.status().state == "partial"
    one.folder.write_bytes("half", b"1")
    assert one.begin().state == "partial"
    assert one.folder.exists("half")  # resuming deletes nothing
    made = one.publish()
    assert one.status().manifest == made
    assert one.begin().state == "valid"


def test_the_manifest_names_every_file_with_size_and_checksum(tmp_path: Path) -> None:
    one = publish(tmp_path)
    made = one.folder.read_json("_manifest.json")
    assert [(f["name"], f["bytes"]) for f in made["files"]] == [("a.bin", 5), ("sub/b.bin", 3)]
    assert made["files"][0]["sha256"] == hashlib.sha256(b"12345").hexdigest()
    assert made["counts"] == {"rows": 3}
    assert made["inputs"]["parents"] == {"shard": "abc"}
    assert {"python", "torch", "ray", "numpy"} <= made["software"].keys()


def test_the_fingerprint_is_of_inputs_and_bytes_not_of_time_or_place(tmp_path: Path) -> None:
    first = publish(tmp_path / "x").folder.read_json("_manifest.json")
    second = publish(tmp_path / "y").folder.read_json("_manifest.json")
    assert first["fingerprint"] == second["fingerprint"]
    other = stage(tmp_path / "z", lr=0.2)
    other.begin()
    assert other.publish()["fingerprint"] != first["fingerprint"]
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 2, "b": 1})
    # Files outside the result are kept in order by their checksums, but are not identity.
    prints = []
    for seconds in (b"1", b"2"):
        timed = stage(tmp_path / f"t{seconds!r}")
        timed.begin()
        timed.folder.write_bytes("export/w", b"same")
        timed.folder.write_bytes("metrics.jsonl", seconds)
        prints.append(timed.publish(result="export/")["fingerprint"])
    assert prints[0] == prints[1]


def test_stale_says_what_changed_and_how_to_go_on(tmp_path: Path) -> None:
    publish(tmp_path)
    changed = stage(tmp_path, lr=0.3, parent="xyz")
    assert changed.status().state == "stale"
    with pytest.raises(StaleError) as caught:
        changed.begin()
    text = str(caught.value)
    assert "config.train.lr: 0.1 → 0.3" in text
    assert 'parents.shard: "abc" → "xyz"' in text
    assert "--rebuild expert-0" in text
    assert "batch" not in text
    assert changed.folder.exists("a.bin")
    assert changed.begin(rebuild=True).state == "absent"
    assert not changed.folder.exists("a.bin")
    assert changed.folder.exists("_lock.json")  # a writer clears under its own lock
    assert changed.status().state == "partial"


def test_keys_that_say_nothing_do_not_hide_what_changed(tmp_path: Path) -> None:
    def one(**embedding: object) -> Stage:
        return Stage("encoders", Folder(tmp_path), {"embedding": embedding}, {})

    one(kind="timm", weights=None).begin()
    assert one(kind="lite").status().reasons == ('config.embedding.kind: "timm" → "lite"',)
    assert one(kind="timm").status().state == "stale"  # it is another config all the same


def test_started_with_other_inputs_is_stale_too(tmp_path: Path) -> None:
    stage(tmp_path).begin()
    assert stage(tmp_path, lr=9).status().state == "stale"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_attempt_that_made_nothing_leaves_no_mark(tmp_path: Path, error: type[BaseException]) -> None:
    first = stage(tmp_path)
    first.begin()
    with pytest.raises(error), first.attempt():
        raise error
    other = stage(tmp_path, lr=9)
    assert other.status().state == "absent"
    other.begin()
    other.folder.write_bytes("a.bin", b"1")
    with pytest.raises(error), other.attempt():
        raise error
    assert other.status().state == "partial"
    assert stage(tmp_path).status().state == "stale"
    with pytest.raises(error), publish(tmp_path / "done").attempt():
        raise error
    assert stage(tmp_path / "done").status().state == "valid"


def test_damaged_says_which_file(tmp_path: Path) -> None:
    one = publish(tmp_path)
    one.folder.write_bytes("a.bin", b"12")
    one.folder.delete("sub/b.bin")
    found = one.status()
    assert found.state == "damaged"
    assert found.reasons == ("a.bin has 2 bytes, its manifest says 5", "sub/b.bin is missing")
    with pytest.raises(StaleError, match="is damaged"):
        one.begin()


def test_same_size_other_bytes_is_found_on_request(tmp_path: Path) -> None:
    one = publish(tmp_path)
    one.folder.write_bytes("a.bin", b"54321")
    assert one.status().state == "valid"
    assert one.status(verify=True).reasons == ("a.bin has another checksum than its manifest says",)
    assert damage(one.folder, one.folder.read_json("_manifest.json")) == []


def test_differences_of_trees() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": None}, "gone": True}
    new = {"a": 1, "b": {"c": [1, 3], "d": None}, "come": "x"}
    assert differences(old, new) == ["b.c: [1, 2] → [1, 3]", 'come: null → "x"', "gone: true → null"]
    assert differences(old, json.loads(json.dumps(old))) == []


def test_a_missing_parent_names_the_job(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run the stage 'partition' first \(python -m jobs.partition"):
        require(Folder(tmp_path), "partition")


# -- the lock -----------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from paris_ray.manifest import Lock
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
    owner = {"host": manifest.socket.gethostname(), "pid": me.pid, "started": me.create_time(), "token": "t", "what": "w", "renewed": time.time()}
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
    monkeypatch.setattr(manifest, "LEASE_SECONDS", 1.0)
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
from paris_ray.manifest import Lock, LockedError
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
    monkeypatch.setattr(manifest, "LEASE_SECONDS", 0.4)
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
    monkeypatch.setattr(manifest, "LEASE_SECONDS", 2.0)
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
    monkeypatch.setattr(manifest, "LEASE_SECONDS", 1.0)
    with Lock(held, "me"):
        first = held.read_json("_lock.json")["renewed"]
        time.sleep(1.5)
        assert held.read_json("_lock.json")["renewed"] > first + 1
    assert not held.exists("_lock.json")


def test_only_the_result_must_stay(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    stage = Stage("expert-0", folder, {}, {})
    stage.begin()
    for name in ("export/w", "checkpoints/1", "metrics"):
        folder.write_bytes(name, b"12")
    stage.publish(result="export/")
    folder.delete("checkpoints/1")
    assert stage.status(verify=True).state == "valid"
    folder.write_bytes("metrics", b"1")
    assert stage.status().state == "damaged"
    folder.write_bytes("metrics", b"12")
    folder.delete("export/w")
    assert stage.status().reasons == ("export/w is missing",)


def test_who_lost_the_lock_does_not_delete_the_new_owners(tmp_path: Path) -> None:
    with Lock(Folder(tmp_path), "old"):
        claim(Folder(tmp_path), what="new")
    assert Folder(tmp_path).read_json("_lock.json")["what"] == "new"
