"""SIGTERM in a training worker: leave a checkpoint at the image where training is, then go.

Ray Train runs the training in a thread of its own, but Python takes signals in the main one. So the main thread of each worker is made to
:func:`listen` before training starts (:mod:`paris_ray.training.launch`), and the loop looks at :func:`asked` after each step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

GRACE_S = 30.0
"""For how long a process is there after a SIGTERM, where nobody says so; Kubernetes' own number."""

IN_POD = "KUBERNETES_SERVICE_HOST"
"""Kubernetes sets it in all pods."""
END = Path(tempfile.gettempdir()) / "paris_ray_end"
"""Where a pod that ends (:mod:`cluster_configs.drain`) says when."""

_asked, _training = threading.Event(), threading.Event()
_ends: list[float] = []  # by each who asked, when the process must be gone

EXIT_CODE = 128 + signal.SIGTERM


class TerminatedError(BaseException):
    """The process was asked to go, and where training was is in a checkpoint. Not an Exception: nothing went wrong that a handler could mend."""


def listen() -> None:
    """Take SIGTERM in this process, whose main thread this must be; while nothing is trained it does what it did before, and so does a second one."""
    before = signal.getsignal(signal.SIGTERM)

    def handler(number: int, frame: FrameType | None) -> None:
        if _training.is_set() and not _asked.is_set():
            ask()
        elif callable(before):
            before(number, frame)
        else:
            sys.exit(EXIT_CODE)

    signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def training() -> Iterator[None]:
    """While this lasts, a SIGTERM is the loop's to answer."""
    _training.set()
    try:
        yield
    finally:
        _training.clear()


def ask(seconds: float | None = None) -> None:
    """As a SIGTERM does while something is trained.

    Args:
        seconds: after how many the process must be gone; of several calls the first end counts. Without it, what :func:`told` left, or
            :data:`GRACE_S`.
    """
    _ends.append(_end_of_pod() if seconds is None else time.monotonic() + seconds)
    _asked.set()


def told(end: float) -> None:
    """Say to the processes of this pod by when those that get a SIGTERM must be gone: a signal carries no number.

    Args:
        end: of ``time.monotonic()``, which is one clock for all processes of a machine.
    """
    new = END.with_suffix(".new")
    new.write_text(str(end))
    new.replace(END)


def _end_of_pod() -> float:
    """Heeded in pods alone, where the file can be nobody else's and ends with them."""
    now = time.monotonic()
    if IN_POD in os.environ:
        with contextlib.suppress(OSError, ValueError):
            return max(now, float(END.read_text()))
    return now + GRACE_S


def seconds_left() -> float:
    """Until the process must be gone; one that goes because another worker was asked has :data:`GRACE_S`."""
    return max(0.0, min(_ends) - time.monotonic()) if _ends else GRACE_S


def asked() -> bool:
    """Whether the process was asked to go."""
    return _asked.is_set()
