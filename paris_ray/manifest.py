"""Stage manifests and the one rule for skip, resume and refuse.

A stage writes ``_started.json`` first and ``_manifest.json`` last. The manifest names every file with size and checksum, the part of the
config that the stage depends on, and the fingerprints of its parents' manifests. From these two files alone follows what a stage does:

=========  ==============================================  =====================================
status     found                                           done
=========  ==============================================  =====================================
``absent``  nothing                                        run
``partial`` started with the same inputs, not finished     resume
``valid``   manifest with the same inputs, files in place  skip
``stale``   started or finished with other inputs          refuse, say what changed (``--rebuild``)
``damaged`` manifest whose files are missing or altered    refuse, say which (``--rebuild``)
=========  ==============================================  =====================================

Where only a part of the files is the result (``export/`` of an expert), the others, such as its checkpoints, may be deleted.

Rows that are appended make a new version of a manifest, which names the fingerprints of the versions before it. What was finished from one of these
is still valid, and its status says from which.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import posixpath
import shlex
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil

from paris_ray.software import software
from paris_ray.storage import Folder

STARTED = "_started.json"
APPENDING = "_append.json"
MANIFEST = "_manifest.json"
LOCK = "_lock.json"
FORMAT = 1

LEASE_SECONDS = 120.0
"""A lock written on another host counts as abandoned when its owner has not renewed it for this long."""


class StaleError(ValueError):
    """What is in a stage's folder was made from other inputs, or is damaged."""


class LockedError(RuntimeError):
    """Somebody else is writing in the folder."""


def fingerprint(value: Any) -> str:
    """Fingerprint of a JSON value: 32 hex digits of SHA-256 over its canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Status:
    """State of a stage's folder: ``absent``, ``partial``, ``valid``, ``stale`` or ``damaged``, why, and what of a valid one is worth knowing."""

    state: str
    reasons: tuple[str, ...] = ()
    manifest: dict[str, Any] | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """A stage's folder together with all that its result depends on.

    Args:
        name: the stage, as the user knows it (``embed``, ``expert-3`` …).
        folder: where its files go.
        config: the part of the config that decides the result, as JSON.
        parents: fingerprints of the manifests it reads from, by name.
        earlier: fingerprints of the versions before them, oldest first, by name.
    """

    name: str
    folder: Folder
    config: dict[str, Any]
    parents: dict[str, str]
    earlier: dict[str, list[str]] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Any]:
        return {"format": FORMAT, "stage": self.name, "config": self.config, "parents": self.parents}

    def status(self, verify: bool = False) -> Status:
        """Look at the folder.

        Args:
            verify: compare checksums too, not only presence and size.
        """
        manifest = _read(self.folder, MANIFEST)
        started = _read(self.folder, STARTED)
        found = manifest or started
        if found is None:
            return Status("absent")
        # A result is of the version it was finished from; what is half done would mix two.
        old = {} if manifest is None else {name: one for name, one in found["inputs"]["parents"].items() if one in self.earlier.get(name, ())}
        changes = differences(found["inputs"], {**self.inputs, "parents": {**self.parents, **old}})
        if changes:  # keys that another kind has not, and that say nothing here, only hide what has changed
            return Status("stale", tuple(change for change in changes if not change.endswith(": null → null")) or tuple(changes), manifest)
        if manifest is None:
            return Status("partial")
        if broken := tuple(damage(self.folder, manifest, verify)):
            return Status("damaged", broken, manifest)
        versions = {name: (self.earlier[name].index(one) + 1, len(self.earlier[name]) + 1) for name, one in old.items()}
        return Status("valid", (), manifest, tuple(f"made from version {one} of {of} of {name}" for name, (one, of) in versions.items()))

    def begin(self, rebuild: bool = False) -> Status:
        """Decide what to do and mark the stage as started.

        Returns:
            the status found; ``valid`` means that there is nothing to do.

        Raises:
            StaleError: the folder holds something made from other inputs, or damaged, and ``rebuild`` is off.
        """
        status = self.status()
        if status.state in ("stale", "damaged") and not rebuild:
            what = "was made from other inputs" if status.state == "stale" else "is damaged"
            listed = "\n".join(f"  - {reason}" for reason in status.reasons[:20])
            raise StaleError(
                f"{self.name}: {self.folder.uri} {what}:\n{listed}\n"
                f"Put back what changed, choose another run_dir, or pass --rebuild {self.name} to delete it and make it anew."
            )
        if rebuild and status.state != "absent":
            self.folder.delete_all(keep=(LOCK,))
            status = Status("absent")
        if status.state == "partial":
            self.folder.sweep()
        if status.state == "absent":
            self.folder.write_json(STARTED, {"inputs": self.inputs})
        return status

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """After :meth:`begin`: an error that ends the work before it has made anything takes back the mark; the next start may have other inputs."""
        try:
            yield
        except BaseException:
            if {entry.name for entry in self.folder.files(recursive=True)} <= {STARTED, LOCK}:
                self.folder.delete(STARTED)
            raise

    def publish(
        self, counts: dict[str, Any] | None = None, seconds: float | None = None, result: str = "", after: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Write the manifest over all files in the folder; the last act of a stage.

        Args:
            counts: figures a reader wants (rows, images, rejects …).
            seconds: how long the stage took.
            result: prefix of the files that are the result (``export/``). The others are listed with their checksums too, but the fingerprint
                leaves them out: metrics hold times and rates, which differ between runs that made the same weights.
            after: the manifest that this one is a new version of.
        """
        files: list[dict[str, Any]] = [
            {"name": entry.name, "bytes": entry.size, "sha256": self.folder.sha256(entry.name)}
            for entry in self.folder.files(recursive=True)
            if not os.path.basename(entry.name).startswith("_") or "/" in entry.name
        ]
        manifest = {
            "inputs": self.inputs,
            "files": files,
            "result": result,
            "counts": counts or {},
            "seconds": seconds,
            "version": 1 if after is None else after["version"] + 1,
            "previous": [] if after is None else [*previous(after), after["fingerprint"]],
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "software": software(),
        }
        # The identity of a result is its inputs and its bytes, not when or where it was made.
        identity = [file for file in files if str(file["name"]).startswith(result)]
        manifest["fingerprint"] = fingerprint({"inputs": manifest["inputs"], "files": identity})
        self.folder.write_json(MANIFEST, manifest)
        return manifest


def require(folder: Folder, made_by: str) -> dict[str, Any]:
    """The manifest of a parent. Raises FileNotFoundError that names the stage to run first."""
    manifest = _read(folder, MANIFEST)
    if manifest is None:
        raise FileNotFoundError(f"{folder.uri} has no {MANIFEST}: run the stage {made_by!r} first (python -m jobs.{made_by} --config …)")
    return manifest


def refuse_half_appended(folder: Folder) -> None:
    """Raise StaleError while an append to a folder, which leaves :data:`APPENDING` there until its new version is published, is not finished."""
    if folder.exists(APPENDING):
        half = folder.read_json(APPENDING)
        again = f"python -m jobs.append --config {posixpath.dirname(folder.uri)}/config.yaml"
        again += f" --source {shlex.quote(json.dumps(half['source']))}" if "source" in half else ""
        again += " --source … --new-expert" if "expert" in half else ""
        raise StaleError(f"{folder.uri} is half appended; when nobody does so now, finish it with the same command again: {again}")


def previous(manifest: dict[str, Any]) -> list[str]:
    """Fingerprints of the versions before a manifest, oldest first."""
    return list(manifest["previous"] or [])


def published(folder: Folder) -> dict[str, Any] | None:
    """The manifest of a folder, or ``None``."""
    return _read(folder, MANIFEST)


def recorded(folder: Folder) -> dict[str, Any] | None:
    """The inputs that a stage's folder was finished or started with, ``None`` if it was not."""
    found = _read(folder, MANIFEST) or _read(folder, STARTED)
    return None if found is None else dict(found["inputs"])


def damage(folder: Folder, manifest: dict[str, Any], verify: bool = False) -> list[str]:
    """What of a manifest's files is altered (by size; with ``verify`` by checksum too), and what of its result is missing."""
    found = {entry.name: entry.size for entry in folder.files(recursive=True)}
    broken = []
    for file in manifest["files"]:
        name, size = file["name"], file["bytes"]
        if name not in found:
            if name.startswith(manifest.get("result", "")):
                broken.append(f"{name} is missing")
        elif found[name] != size:
            broken.append(f"{name} has {found[name]} bytes, its manifest says {size}")
        elif verify and folder.sha256(name) != file["sha256"]:
            broken.append(f"{name} has another checksum than its manifest says")
    return broken


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, a line each: ``config.train.lr: 0.001 → 0.003``."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            here = f"{path}.{key}" if path else key
            if key not in old or key not in new:
                before, after = json.dumps(old.get(key)), json.dumps(new.get(key))
                lines.append(f"{here}: {before} → {after}")
            else:
                lines += differences(old[key], new[key], here)
        return lines
    return [] if old == new else [f"{path}: {json.dumps(old)} → {json.dumps(new)}"]


def _read(folder: Folder, name: str) -> dict[str, Any] | None:
    try:
        return dict(folder.read_json(name))
    except FileNotFoundError:
        return None


class Lock:
    """One writer per folder; a context manager.

    The lock is a file with its owner's host, process and time. An owner on this host counts as gone when its process is gone (id and start
    time); one elsewhere when it has not renewed the file for :data:`LEASE_SECONDS`. So a lock outlives neither crash nor power cut. An owner that was
    away for so long that another took its lock finds out at the next renewal, and is interrupted as by Ctrl-C: two writers would be worse. One that
    cannot renew it in an object store is so before its lease ends, without asking anybody.

    Args:
        folder: what to lock.
        what: the owner in words, for the other's error message.
        wait: seconds to wait for another owner to go.

    Raises:
        LockedError: another live process holds it.
    """

    def __init__(self, folder: Folder, what: str, wait: float = 0.0):
        self.folder, self.what, self.wait = folder, what, wait
        self._stop = threading.Event()
        # A renewal that lands late would take the place of another's lock.
        self._quick = folder.impatient(LEASE_SECONDS / 8)

    def _claim(self) -> bytes:
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "token": self.token,
            "what": self.what,
            "renewed": time.time(),
        }
        return json.dumps(owner).encode()

    def __enter__(self) -> Lock:
        self.token = uuid.uuid4().hex
        deadline = time.monotonic() + self.wait
        first: dict[str, Any] | None = None
        waiting = False
        while not self._create():
            owner = self._owner()
            if owner is None:
                time.sleep(0.01)
                continue
            if not _alive(owner):
                self._break(owner)
                continue
            if owner["host"] != socket.gethostname() and first in (None, owner):
                # Its host may have died with it; that it lives shows at its next renewal, that it does not when the lease ends.
                if first is None:
                    print(f"{self.folder.uri} was locked by {owner['what']} on {owner['host']}; waiting to see whether it lives", file=sys.stderr)
                    first = owner
            elif time.monotonic() < deadline:
                if not waiting:
                    print(f"{self.folder.uri} is being written by {owner['what']} (process {owner['pid']}); waiting for it", file=sys.stderr)
                    waiting = True
            else:
                raise LockedError(
                    f"{self.folder.uri} is being written by {owner['what']} (process {owner['pid']} on {owner['host']}). "
                    "Only one writer is allowed: wait for it, or stop it and run this again."
                )
            time.sleep(0.5)
        if not self._owned():
            raise LockedError(f"{self.folder.uri} was locked by somebody else at the same moment; run this again")
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lock")
        self._thread.start()
        if not self.folder.is_local:
            threading.Thread(target=self._fence, daemon=True, name="lease").start()
        return self

    def _create(self) -> bool:
        self._renewed = _now()
        return self.folder.create(LOCK, self._claim())

    def _owner(self) -> dict[str, Any] | None:
        try:
            return _read(self.folder, LOCK)
        except ValueError:
            return {"token": "unreadable"}  # torn by a power cut: locks appear whole, so nobody is writing it

    def _owned(self) -> bool:
        return (self._owner() or {}).get("token") == self.token

    def _break(self, dead: dict[str, Any]) -> None:
        """Delete a dead owner's lock, unless somebody else has done so and put up their own."""
        with self.folder.guard(LOCK):
            if (self._owner() or {}).get("token") == dead["token"]:
                self.folder.delete(LOCK)

    def _renew(self) -> None:
        pause = LEASE_SECONDS / 4
        while not self._stop.wait(pause):
            pause = LEASE_SECONDS / 4
            try:
                before = _now()
                owner = _read(self._quick, LOCK) or {}
                if owner.get("token") != self.token:
                    by = f"{owner['what']} (process {owner['pid']} on {owner['host']}) has it" if owner else "nobody has it"
                    self._lost(f"has lost its lock, now {by}")
                    return
                self._quick.write_bytes(LOCK, self._claim())
                self._renewed = before
            except OSError:
                pause = LEASE_SECONDS / 24  # the store is away for a moment; there are some more chances

    def _ends(self) -> float:
        """When the owner takes its own lease for ended: a little before the others do."""
        return self._renewed + LEASE_SECONDS * 7 / 8

    def _fence(self) -> None:
        """Interrupt an owner whose lease ends, though the store still owe it an answer: nobody else will ask before taking the lock."""
        while not self._stop.wait(max(0.0, self._ends() - _now())):
            if _now() >= self._ends():
                self._lost(f"has lost its lock: it could not be renewed for {_now() - self._renewed:.0f} s")
                return

    def _lost(self, why: str) -> None:
        if self._stop.is_set():
            return
        self._stop.set()
        print(f"{self.folder.uri}: {self.what} {why}; stopping, so that there is one writer only", file=sys.stderr)
        # What runs under nohup may ignore the first.
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGTERM if ignored else signal.SIGINT)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(LEASE_SECONDS / 4)
        if self.folder.is_local:
            if self._owned():
                self.folder.delete(LOCK)
            return
        while _now() < self._ends():  # later it may be another's, and ends by itself
            try:
                if (_read(self._quick, LOCK) or {}).get("token") == self.token:
                    self._quick.delete(LOCK)
                return
            except OSError:
                time.sleep(LEASE_SECONDS / 240)


def _now() -> float:
    """Seconds on a clock that nobody sets and that runs on while a machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _alive(owner: dict[str, Any]) -> bool:
    if "host" not in owner:
        return False
    if owner["host"] != socket.gethostname():
        return bool(time.time() - owner["renewed"] < LEASE_SECONDS)
    try:
        process = psutil.Process(owner["pid"])
        return abs(process.create_time() - owner["started"]) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
