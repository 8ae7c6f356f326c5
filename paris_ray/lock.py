"""One writer per folder, on a disk or in an object store, by a file that its owner renews."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from paris_ray import storage_io
from paris_ray.storage import Folder

LOCK = "_lock.json"

LEASE_SECONDS = 120.0
"""A lock of another host is free when it has not been renewed for so long."""

EXIT = 130
"""Exit code of an owner that did not stop in time, as of one that Ctrl-C has ended: another attempt may do better."""

_lost: list[Lock] = []


class LockedError(RuntimeError):
    """Somebody else is writing in the folder."""


def lost() -> bool:
    """Whether this process has lost a lock whose block it has not left yet: what it finds in the folder may be another's."""
    return bool(_lost)


class Lock:
    """One writer per folder; a context manager.

    The lock is a file with its owner's host, process and time, written anew every quarter of a lease (:data:`LEASE_SECONDS`).

    When another may begin. An owner on the same host is gone when its process is (id and start time). One elsewhere is gone when its file has not
    changed for a whole lease *while the other watched it*, or is older than ten leases, by which no two clocks differ (S3 refuses a quarter of an
    hour). So a lock outlives neither crash nor power cut.

    When the owner stops. Its lease begins before its last renewal was sent, thus before anybody could see that one. At 7/8 of it the owner is
    interrupted as by Ctrl-C; at 15/16 its process ends on the spot if it is still in the block, or an upload that was given up is on its way. In
    the rest Ray ends its workers, as it does when their driver is gone. An owner that finds another's lock in place of its own is interrupted at
    once, and has 1/16 of a lease to leave.

    By what clock. Each measures spans on its own, one that nobody sets and that runs on while the machine sleeps, and looks at it every second: who
    wakes after its lease ends then. A virtual machine that is paused sees no time pass; its owner finds out at the next renewal.

    What is under way. A process that has ended asks no store again and renames no file. What it had handed to the network may still arrive; stores
    close connections that are silent for less than a lease. On a disk the lock appears by a link, so one wins, and is renewed and broken under the
    file system's own lock, where it has such. A store gives neither, so whoever has seen no owner, or a dead one, writes its claim and looks again
    after a pause: of those who took less than the pause, from looking to having written, all have written before any of them looks again, and the
    last one finds its own claim. Who took longer may have written over an owner's claim; it waits a whole lease, in which that owner finds out and
    stops. The lock's requests are made once, and fail after a sixteenth of a lease without an answer. The lock is given back in the first half of a
    lease only, so that the deletion does not come late, and not while an upload that was given up may still arrive.

    On a disk of this machine alone there is no lease to end: the owner's process tells, also after a night's sleep.

    Args:
        folder: what to lock.
        what: the owner in words, for the other's error message.
        wait: seconds to wait for another owner to go.

    Raises:
        LockedError: another live process holds it.
    """

    def __init__(self, folder: Folder, what: str, wait: float = 0.0):
        self.folder, self.what, self.wait = folder, what, wait
        self._leased = folder.is_shared
        self._quick = folder.impatient(LEASE_SECONDS / 16)
        self._left = threading.Event()
        self._limit: float | None = None  # once the lock is lost: when the process ends

    # -- taking it ----------------------------------------------------------------------------------------------

    def __enter__(self) -> Lock:
        self.token = uuid.uuid4().hex
        try:
            self._wait_and_take()
        except BaseException:  # with a claim that nobody stands behind, perhaps
            with contextlib.suppress(OSError):
                if self._owned(self._quick):
                    self._quick.delete(LOCK)
            raise
        self._keeper = threading.Thread(target=self._keep, daemon=True, name="lock")
        self._keeper.start()
        threading.Thread(target=self._watch, daemon=True, name="lease").start()
        return self

    def _wait_and_take(self) -> None:
        deadline = time.monotonic() + self.wait
        with contextlib.suppress(OSError):
            self._quick.exists(LOCK)  # the first request opens connections, which is no part of how long a claim takes
        dead: dict[str, Any] | None = None
        seen, since, lives, waiting = None, 0.0, False, False
        while not self._take(dead):
            owner = self._owner(self.folder)
            if owner is None or owner.get("token") == self.token:
                continue
            here = self._is_here(owner)
            if owner != seen:
                seen, since, lives = owner, _now(), seen is not None
            if _dead(owner, here, _now() - since):
                dead = owner
                continue
            if not here and not lives:
                # Its host may have died with it; that it lives shows at its next renewal, that it does not when the lease ends.
                if not waiting:
                    print(f"{self.folder.uri} was locked by {owner['what']} on {owner['host']}; waiting to see whether it lives", file=sys.stderr)
            elif time.monotonic() < deadline:
                if not waiting:
                    print(f"{self.folder.uri} is being written by {owner['what']} (process {owner['pid']}); waiting for it", file=sys.stderr)
            else:
                raise LockedError(
                    f"{self.folder.uri} is being written by {owner['what']} (process {owner['pid']} on {owner['host']}). "
                    "Only one writer is allowed: wait for it, or stop it and run this again."
                )
            waiting = True
            time.sleep(min(0.5, LEASE_SECONDS / 120))

    def _take(self, dead: dict[str, Any] | None) -> bool:
        """Take the lock if nobody has it, or the dead owner still."""
        if self.folder.is_local:
            if dead is not None:
                self._break(dead)
            self._renewed = _now()
            return self.folder.create(LOCK, self._claim()) or self._owned(self.folder)  # a network's disk may have lost its answer
        late = False
        tries_end = _now() + LEASE_SECONDS * 3 / 4
        while True:
            began = _now()
            try:
                owner = self._owner(self._quick)
                if owner is not None and owner != dead and owner.get("token") != self.token:
                    return False
                self._renewed = began
                self._quick.write_bytes(LOCK, self._claim())
                return self._settled(late or _now() - began >= _pause())
            except OSError as error:
                late = late or _now() - began >= _pause()  # it may still arrive
                if not storage_io.passes(error) or _now() >= tries_end:
                    raise
                time.sleep(LEASE_SECONDS / 240)

    def _settled(self, late: bool) -> bool:
        """Whether the claim is still there after the pause; after a whole lease, in which it is renewed, if it was written late."""
        if late:
            print(f"{self.folder.uri}: the store answers late; waiting to see whether somebody else writes there", file=sys.stderr)
        end = _now() + (LEASE_SECONDS if late else _pause())
        while (left := end - _now()) > 0:
            time.sleep(min(left, LEASE_SECONDS / 8))
            if _now() >= self._ends():
                return False
            began = _now()
            with contextlib.suppress(OSError):
                if began - self._renewed >= LEASE_SECONDS / 4 and not self._renew():
                    return False
            if _now() - began >= _pause():  # a claim once more, and as late
                end = _now() + LEASE_SECONDS
        return self._owned(self.folder)

    def _break(self, dead: dict[str, Any]) -> None:
        """Delete a dead owner's lock on a disk, unless it has changed since."""
        with self.folder.guard(LOCK):
            if self._owner(self.folder) == dead:
                self.folder.delete(LOCK)

    def _is_here(self, owner: dict[str, Any]) -> bool:
        """Whether an owner is on this host; of two machines of one name the kernel's number for its boot tells."""
        return owner.get("host") == socket.gethostname() and (not self._leased or owner.get("boot", _boot()) == _boot())

    def _claim(self) -> bytes:
        owner = {
            "host": socket.gethostname(),
            "boot": _boot(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "token": self.token,
            "what": self.what,
            "renewed": time.time(),
        }
        return json.dumps(owner).encode()

    def _owner(self, folder: Folder) -> dict[str, Any] | None:
        try:
            return dict(folder.read_json(LOCK))
        except FileNotFoundError:
            return None
        except ValueError:
            return {"token": "unreadable"}  # torn by a power cut: locks appear whole, so nobody is writing it

    def _owned(self, folder: Folder) -> bool:
        return (self._owner(folder) or {}).get("token") == self.token

    # -- holding it ---------------------------------------------------------------------------------------------

    def _renew(self) -> bool:
        """Write the lock anew; False if it is another's, or nobody's."""
        began = _now()
        try:
            with self.folder.guard(LOCK):
                if not self._owned(self._quick):
                    return False
                self._quick.write_bytes(LOCK, self._claim())
        except FileNotFoundError:  # the folder is gone
            return False
        self._renewed = began
        return True

    def _keep(self) -> None:
        """Renew the lock until the block is left and nothing is on its way any more, then give it back."""
        due = self._renewed + LEASE_SECONDS / 4
        while not self._left.is_set() or storage_io.given_up():
            if due <= _now() < self._ends():
                try:
                    if not self._renew():
                        owner = self._owner(self._quick)
                        by = f"{owner['what']} (process {owner['pid']} on {owner['host']})" if owner and "host" in owner else "nobody"
                        self._lose(f"{by} has it now")
                        return
                    due = self._renewed + LEASE_SECONDS / 4
                except Exception:  # whatever a store's client raises: it is away for a moment, and there are some more chances
                    due = _now() + LEASE_SECONDS / 24
            if self._left.wait(LEASE_SECONDS / 120) and storage_io.given_up():
                time.sleep(LEASE_SECONDS / 120)
        self._give_back()

    def _give_back(self) -> None:
        """Delete the lock; in a store while there is time for it."""
        while self.folder.is_local or (self._limit is None and _now() < self._renewed + LEASE_SECONDS / 2):
            began = _now()
            try:
                with self.folder.guard(LOCK):
                    if self._owned(self._quick):
                        self._quick.delete(LOCK)
                return
            except OSError as error:
                if self.folder.is_local or isinstance(error, FileNotFoundError):
                    return
                # A deletion without an answer may still arrive, and must not do so after the next one.
                time.sleep(LEASE_SECONDS / (240 if _now() - began < _pause() else 8))

    def _ends(self) -> float:
        """When the owner takes its lease for ended."""
        return self._renewed + LEASE_SECONDS * 7 / 8 if self._leased else math.inf

    def _watch(self) -> None:
        """Interrupt an owner whose lease ends, though the store still owe it an answer, and end one that does not stop."""
        while not self._left.is_set() or storage_io.given_up():
            now, ends = _now(), self._ends()
            ago = f"{now - self._renewed:.0f} s"
            if now >= min(self._limit or math.inf, ends + LEASE_SECONDS / 16):
                print(f"{self.folder.uri}: {self.what} has lost its lock, renewed {ago} ago, and has not stopped; ended", file=sys.stderr, flush=True)
                os._exit(EXIT)
            if self._limit is None and now >= ends:
                self._lose(f"it could not be renewed for {ago}")
            time.sleep(LEASE_SECONDS / 120)

    def _lose(self, why: str) -> None:
        self._limit = _now() + LEASE_SECONDS / 16
        if self._left.is_set():
            return
        _lost.append(self)
        print(f"{self.folder.uri}: {self.what} has lost its lock: {why}; stopping, so that there is one writer only", file=sys.stderr, flush=True)
        # What runs under nohup may ignore the first.
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGTERM if ignored else signal.SIGINT)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._left.set()
        if self in _lost:
            _lost.remove(self)
        if self._limit is None and not storage_io.given_up():
            self._keeper.join(LEASE_SECONDS / (2 if kind is None else 8))


def _now() -> float:
    """Seconds on a clock that nobody sets and that runs on while a machine sleeps: Linux has one of its own for that, others' monotonic one does."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _pause() -> float:
    """After how long whoever has written a claim in a store looks again, and how long that may have taken."""
    return LEASE_SECONDS / 60


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # no Linux
        return ""


def _dead(owner: dict[str, Any], here: bool, unchanged: float) -> bool:
    """Whether an owner is gone, whose lock has been watched without a change for so many seconds."""
    if "host" not in owner:
        return True
    if not here:
        return bool(unchanged >= LEASE_SECONDS or time.time() - owner["renewed"] > 10 * LEASE_SECONDS)
    try:
        process = psutil.Process(owner["pid"])
        return abs(process.create_time() - owner["started"]) >= 1.0 or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
