"""Live progress of a stage: one small file that a follower polls, and a console line with rate and ETA."""

from __future__ import annotations

import collections
import math
import sys
import time
from types import TracebackType

from paris_ray.storage import Folder

PRINT_SECONDS = 5.0
WRITE_SECONDS = 1.0
WRITE_SECONDS_REMOTE = 10.0
"""An object store answers in tenths of a second; writing there once a second would cost the training loop."""
WINDOW_SECONDS = 30.0
"""The rate is that of the last half minute."""


class Progress:
    """Progress of one stage, in ``events/<stage>.json`` and on the console.

    As a context manager it says that the stage has failed when an error leaves it, or was stopped when somebody asked it to end.

    The file holds ``stage, state (starting | running | done | failed | stopped), done, total, unit, rate (units per second), eta (seconds or
    null), loss, message, updated (unix time)``. It is replaced atomically at most once a second; :meth:`update` costs about a microsecond in
    between. Progress is a courtesy: when the store is away for a moment the update is lost and the work goes on.

    Args:
        folder: ``RUN/events``.
        stage: the stage's name, as in :mod:`paris_ray.stages`.
        total: how much there is to do, 0 when nobody knows.
        unit: what is counted: ``images``, ``rows`` …
    """

    def __init__(self, folder: Folder, stage: str, total: int, unit: str = "images"):
        self.folder, self.stage, self.total, self.unit = folder, stage, total, unit
        self.done = 0
        self.loss: float | None = None
        self.message = ""
        self._state, self._moved = "starting", False
        self._write_every = WRITE_SECONDS if folder.is_local else WRITE_SECONDS_REMOTE
        self._written = self._printed = -math.inf
        self._history: collections.deque[tuple[float, int]] = collections.deque()
        self._write()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            self.stop()
        elif error is not None:
            self.fail(f"{type(error).__name__}: {error}".splitlines()[0], said=False)  # whom it reaches says it

    def update(self, done: int, loss: float | None = None, message: str = "", force: bool = False) -> None:
        """Say how far the stage is.

        Args:
            done: units done so far, of ``total``; what an earlier attempt did counts as done and does not raise the rate.
            loss: the current training loss, where there is one.
            message: a few words; the last one said stays until there is a new one.
            force: write and print now.
        """
        now = time.monotonic()
        self.done, self._state = done, "running"
        self.loss = loss if loss is not None else self.loss
        self.message = message or self.message
        if not force and now - self._written < self._write_every:
            return
        if not self._moved and self._history and done > self._history[0][1]:
            self._history.clear()  # until now it was starting, which tells nothing of the time to go
            self._moved = True
        self._history.append((now, done))
        while len(self._history) > 2 and now - self._history[1][0] > WINDOW_SECONDS:
            self._history.popleft()
        self._write()
        if force or now - self._printed >= PRINT_SECONDS:
            self._printed = now
            print(self.line(), file=sys.stderr, flush=True)

    def finish(self, message: str = "") -> None:
        """The stage is done."""
        self._end("done", message)

    def fail(self, message: str, said: bool = True) -> None:
        """The stage has failed; ``message`` says why in a line, on the console too if ``said``."""
        self._end("failed", message, said)

    def stop(self) -> None:
        """The stage has ended before it was done, because somebody asked."""
        self._state, self.message = "stopped", "the same command goes on"
        self._write()
        of = f" of {self.total}" if self.total else ""
        print(f"{self.stage}: stopped at {self.done}{of} {self.unit}; {self.message}", file=sys.stderr, flush=True)

    @property
    def rate(self) -> float:
        """Units per second, 0.0 while unknown."""
        if len(self._history) < 2:
            return 0.0
        (then, before), (now, done) = self._history[0], self._history[-1]
        return max(0.0, (done - before) / (now - then)) if now > then else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds to go, ``None`` while unknown."""
        return max(0, self.total - self.done) / self.rate if self.rate > 0 and self.total else None

    def line(self) -> str:
        """The console line."""
        of = f" / {self.total}" if self.total else ""
        parts = [f"{self.stage}: {self.done}{of} {self.unit}"]
        if self.rate:
            parts.append(f"{self.rate:.1f} {self.unit}/s")
        if self.eta is not None:
            parts.append(f"{clock(self.eta)} to go")
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        return ", ".join([*parts, *([self.message] if self.message else [])])

    def _end(self, state: str, message: str, said: bool = True) -> None:
        self._state, self.message = state, message or self.message
        self._write()
        self.message = self.message if said else ""
        print(f"{self.line()}, {state}", file=sys.stderr, flush=True)

    def _write(self) -> None:
        self._written = time.monotonic()
        event = {
            "stage": self.stage,
            "state": self._state,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "rate": self.rate,
            "eta": self.eta,
            "loss": self.loss if self.loss is not None and math.isfinite(self.loss) else None,
            "message": self.message,
            "updated": time.time(),
        }
        try:
            self.folder.write_json(f"{self.stage}.json", event)
        except OSError as error:
            print(f"{self.stage}: progress not written ({error}); the work goes on", file=sys.stderr, flush=True)


def counted(number: int, what: str) -> str:
    """A number of things: ``1 restart``, ``2 restarts``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def clock(seconds: float) -> str:
    """A duration for people: ``42 s``, ``3 min 05 s``, ``2 h 07 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
