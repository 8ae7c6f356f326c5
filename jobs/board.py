"""What a follower of a run sees: a small table that rewrites itself on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any

from paris_ray.progress import clock
from paris_ray.storage import Folder

LINE_SECONDS = 10.0
TABLE_SECONDS = 2.0


class Board:
    """Shows the events of the stages that run.

    Args:
        events: ``RUN/events``.
    """

    def __init__(self, events: Folder):
        self.events = events
        self.began = time.monotonic()
        self.terminal = sys.stdout.isatty()
        self._drawn = 0
        self._shown = 0.0

    def say(self, text: str) -> None:
        """Print something that stays."""
        self._wipe()
        print(f"[{clock(time.monotonic() - self.began)}] {text}", flush=True)

    def show(self, done: int, total: int, running: Mapping[str, float]) -> None:
        """Show where the running stages are, at most every few seconds.

        Args:
            done: stages that are done.
            total: all stages.
            running: since when (unix time) each runs; older events belong to an earlier attempt.
        """
        now = time.monotonic()
        if now - self._shown < (TABLE_SECONDS if self.terminal else LINE_SECONDS):
            return
        self._shown = now
        parts = [(name, self._progress(name, since)) for name, since in running.items()]
        if not self.terminal:
            self.say(" | ".join([f"{done}/{total} stages done", *(f"{name} {text}" for name, text in parts)]))
            return
        lines = [f"[{clock(now - self.began)}] {done} of {total} stages done", *(f"  {name:<16}{text}" for name, text in parts)]
        # A line that the terminal broke in two would be wiped by half.
        lines = [line[: shutil.get_terminal_size().columns - 1] for line in lines]
        self._wipe()
        print("\n".join(lines), flush=True)
        self._drawn = len(lines)

    def _wipe(self) -> None:
        if self._drawn:
            # Up to the table's first line, and clear from there.
            print(f"\x1b[{self._drawn}F\x1b[J", end="")
            self._drawn = 0

    def _progress(self, name: str, since: float) -> str:
        try:
            event = self.events.read_json(f"{name}.json")
        except (OSError, ValueError):
            return "starting"
        return describe(event) if event["updated"] >= since else "starting"


def describe(event: Mapping[str, Any]) -> str:
    """A stage's event in a few words."""
    if event["state"] == "starting":
        return "starting"
    share = f" ({100 * event['done'] / event['total']:.0f} %)" if event["total"] else ""
    of = f"/{event['total']}" if event["total"] else ""
    parts = [f"{event['done']}{of} {event['unit']}{share}"]
    if event["rate"]:
        parts.append(f"{event['rate']:.0f}/s")
    if event["eta"] is not None and event["state"] == "running":
        parts.append(f"{clock(event['eta'])} to go")
    if event["loss"] is not None:
        parts.append(f"loss {event['loss']:.3f}")
    if event["message"]:
        parts.append(event["message"])
    return ", ".join(parts)
