"""A wish that a training stop, left as a file in the run directory: that is the one thing which a follower and every worker see, wherever they are.

A worker that finds it does what it does on a SIGTERM (:mod:`paris_ray.training.termination`), and its training ends with a checkpoint.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from paris_ray.storage import Folder

EVERY_S, EVERY_S_REMOTE = 1.0, 10.0
CHECKPOINT_S = 600.0
"""How long a training that is asked to stop may take for its checkpoint."""


class StoppedError(RuntimeError):
    """The training was asked to stop and has left a checkpoint; the same command goes on from there."""


def _file(stage: str) -> str:
    return f"{stage}.stop"


def wish(events: Folder, stage: str) -> None:
    """Ask a training to stop."""
    events.write_bytes(_file(stage), b"")


def withdraw(events: Folder, stage: str) -> None:
    """Forget what was asked of an earlier start."""
    events.delete(_file(stage))


class Listener:
    """Looks for the wish in a thread of its own, until it is there.

    Args:
        events: ``RUN/events``.
        stage: which training.
        on_wish: called once, from that thread.
    """

    def __init__(self, events: Folder, stage: str, on_wish: Callable[[], None]):
        self._events, self._stage, self._on_wish = events, stage, on_wish
        self._every = EVERY_S if events.is_local else EVERY_S_REMOTE
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="stopping")

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def wished(self) -> bool:
        """Whether it is there now; of several workers, who go together, another may have seen it first."""
        return self._events.exists(_file(self._stage))

    def _run(self) -> None:
        while not self._end.wait(self._every):
            with contextlib.suppress(OSError):  # the store is away for a moment
                if self.wished():
                    self._on_wish()
                    return
