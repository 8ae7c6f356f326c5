"""What a follower of a run sees: a small table that rewrites itself on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paris_ray import stages
from paris_ray.progress import clock
from paris_ray.storage import Folder
from paris_ray.training import machines
from paris_ray.training.machines import QUEUED

LINE_SECONDS = 10.0
TABLE_SECONDS = 2.0
NAME_WIDTH = 16

Events = dict[str, Mapping[str, Any] | None]
"""The last event of each running stage; ``None`` while its present attempt has said nothing."""


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

    def show(
        self,
        done: int,
        total: int,
        running: Mapping[str, float],
        to_go: Callable[[Events], float | None] = lambda events: None,
        notes: Sequence[str] = (),
    ) -> None:
        """Show where the running stages are, at most every few seconds.

        Args:
            done: stages that are done.
            total: all stages.
            running: since when (unix time) each runs; older events belong to an earlier attempt.
            to_go: seconds of training left, from the running stages' events; ``None`` while unknown.
            notes: what else is to be said.
        """
        now = time.monotonic()
        if now - self._shown < (TABLE_SECONDS if self.terminal else LINE_SECONDS):
            return
        self._shown = now
        events: Events = {name: self.event(name, since) for name, since in running.items()}
        left = to_go(events)
        head = ", ".join([f"{done} of {total} stages done", *([f"about {clock(left)} of training to go"] if left is not None else []), *notes])
        parts = [(name, describe(name, event, time.time() - running[name])) for name, event in events.items()]
        if not self.terminal:
            self.say(" | ".join([head, *(f"{name} {text}" for name, text in parts)]))
            return
        size = shutil.get_terminal_size()
        lines = table(f"[{clock(now - self.began)}] {head}", parts, size.columns - 1)[: size.lines - 1]
        self._wipe()
        print("\n".join(lines), flush=True)
        self._drawn = len(lines)

    def event(self, name: str, since: float) -> Mapping[str, Any] | None:
        """The last event of a stage; ``None`` while the attempt that runs since then has said nothing."""
        try:
            event = machines.event(self.events, name)
        except (OSError, ValueError):
            return None
        return event if event["updated"] >= since and (event["state"] != "starting" or event["message"]) else None

    def _wipe(self) -> None:
        if self._drawn:
            # Up to the table's first line, and clear from there.
            print(f"\x1b[{self._drawn}F\x1b[J", end="")
            self._drawn = 0


def table(head: str, parts: list[tuple[str, str]], width: int) -> list[str]:
    """Lines of at most ``width`` letters; longer ones go on below, because one that the terminal broke in two would be wiped by half."""
    lines = textwrap.wrap(head, width)
    for name, text in parts:
        lines += textwrap.wrap(text, width, initial_indent=f"  {name:<{NAME_WIDTH}}", subsequent_indent=" " * (NAME_WIDTH + 2))
    return lines


def describe(name: str, event: Mapping[str, Any] | None, seconds: float) -> str:
    """A stage in a few words.

    Args:
        name: the stage.
        event: the last it has said.
        seconds: since when it runs.
    """
    if event is None:
        why = " (Ray Train takes 15–30 s, once what the stage asks for is free)" if stages.trains(name) else ""
        return f"starting for {clock(seconds)}{why}"
    if event["state"] in (QUEUED, "starting"):  # it waits for machines
        return str(event["message"])
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
