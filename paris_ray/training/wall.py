"""How long a stage has been at work, over all its starts: what goodput is measured against. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import time

from paris_ray.storage import Folder
from paris_ray.training.machines import event

FILE = "_wall.json"


def last_sign(events: Folder, stage: str) -> float:
    """When the stage last said how far it was, in unix time; 0 if it never did."""
    try:
        return float(event(events, stage)["updated"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


class Wall:
    """Seconds in which somebody was training a stage: starts, waiting for machines and lost work included, pauses between two commands left out.

    Of a driver that was killed, what counts is until its last sign of life.

    Args:
        stage: the stage's folder, where this is remembered.
        last_sign: when an earlier driver last gave one, in unix time.
    """

    def __init__(self, stage: Folder, last_sign: float):
        self.stage, self.began, self._ended = stage, time.time(), False
        try:
            before = stage.read_json(FILE)
            self.before = float(before["seconds"])
            if before["began"] is not None:
                self.before += max(0.0, last_sign - float(before["began"]))
        except (OSError, ValueError, KeyError, TypeError):
            self.before = 0.0
        self._write(self.began)

    def __enter__(self) -> Wall:
        return self

    def __exit__(self, *_: object) -> None:
        self.before, self._ended = self.seconds, True
        self._write(None)

    @property
    def seconds(self) -> float:
        """So far, or until the end."""
        return self.before + (0.0 if self._ended else time.time() - self.began)

    def _write(self, began: float | None) -> None:
        with contextlib.suppress(OSError):  # a figure for people: nothing depends on it
            self.stage.write_json(FILE, {"seconds": self.before, "began": began})
