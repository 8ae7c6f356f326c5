"""Ratios of time of functions that are run in turn, so that all of them see the same machine."""

from __future__ import annotations

import datetime
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path


def interval(values: list[float]) -> tuple[float, float]:
    """The narrowest pair of order statistics, alike from both ends, that covers the median with at least 95 % probability (binomial).

    Raises:
        ValueError: fewer than six values, whose extremes do not.
    """
    n, ordered = len(values), sorted(values)
    # The ends, each `rank` values from its extreme, miss the median if no more than `rank` values lie below it, or above it.
    ranks = [rank for rank in range(n) if 1 - 2 * sum(math.comb(n, j) for j in range(rank + 1)) / 2**n >= 0.95]
    if not ranks:
        raise ValueError(f"{n} values are too few for an interval of 95 %; take 9 or more")
    return ordered[ranks[-1]], ordered[n - 1 - ranks[-1]]


def alternate(rounds: Iterable[dict[str, Callable[[], float]]]) -> dict[str, list[float]]:
    """Seconds of each function in each round; the order of a round is that of the round before, reversed."""
    times: dict[str, list[float]] = {}
    for number, functions in enumerate(rounds):
        for name in functions if number % 2 == 0 else reversed(functions):
            times.setdefault(name, []).append(functions[name]())
    return times


def ratios(what: str, times: dict[str, list[float]], ours: str = "ours") -> list[str]:
    """A row of a Markdown table for each of the others: what, whom, seconds of both (medians), theirs over ours with its interval, rounds."""
    rows = []
    for name in times.keys() - {ours}:
        each = [theirs / mine for theirs, mine in zip(times[name], times[ours], strict=True)]
        low, high = interval(each)
        seconds = f"{statistics.median(times[ours]):.3f} | {statistics.median(times[name]):.3f}"
        rows.append(f"| {what} | {name} | {seconds} | {statistics.median(each):.3f} | {low:.3f} – {high:.3f} | {len(each)} |")
    return sorted(rows)


HEAD = ["| what | against | ours, s | theirs, s | ratio | interval | rounds |", "|---|---|---|---|---|---|---|"]


def hardware(threads: int) -> str:
    """Date and machine, in words."""
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    load = os.getloadavg()[0]
    model = names[0] if names else platform.machine()
    machine = f"{model}, {os.cpu_count()} cores, {threads} thread(s), load {load:.1f} at the start"
    return f"{datetime.date.today()} · {machine} · Python {platform.python_version()}"
