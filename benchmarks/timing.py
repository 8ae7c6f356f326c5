"""Two functions timed against each other: alternating blocks, ratios of pairs, the median with its interval."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

LEAST_PAIRS = 9
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        ours: median seconds of a call.
        theirs: the same.
        ratio: median of the pairs' ratios, theirs over ours; above 1 ours is faster.
        low: lower end of its interval.
        high: upper end.
        pairs: how many.
        calls: in a block.
    """

    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    pairs: int
    calls: int


def interval(values: list[float]) -> tuple[float, float]:
    """The narrowest pair of order statistics, alike from both ends, that covers the median with at least 95 % probability (binomial).

    Raises:
        ValueError: fewer than six values, whose extremes do not.
    """
    n, ordered = len(values), sorted(values)
    # The ends, each `rank` values from its extreme, miss the median if no more than `rank` values lie below it, or above it.
    cover = [1 - 2 * sum(math.comb(n, j) for j in range(rank + 1)) / 2**n for rank in range(n)]
    ranks = [rank for rank in range(n) if cover[rank] >= CONFIDENCE]
    if not ranks:
        raise ValueError(f"{n} values are too few for an interval of {CONFIDENCE:.0%}; take {LEAST_PAIRS} or more")
    return ordered[ranks[-1]], ordered[n - 1 - ranks[-1]]


def seconds(function: Callable[[], object], calls: int, device: str = "cpu") -> float:
    """Seconds of one call, from a block of calls."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def compare(ours: Callable[[], object], theirs: Callable[[], object], pairs: int, block_seconds: float, device: str = "cpu") -> Comparison:
    """Time two functions in blocks A B B A A B …, so that both see the same machine.

    Args:
        ours: the one.
        theirs: the other.
        pairs: blocks of each; at least nine.
        block_seconds: length of a block of theirs, about.
        device: torch device on which they work.
    """
    if pairs < LEAST_PAIRS:
        raise ValueError(f"pairs: {pairs} is below {LEAST_PAIRS}")
    for function in (ours, theirs):  # compilation, allocations, caches
        seconds(function, 2, device)
    calls = max(1, math.ceil(block_seconds / seconds(theirs, 1, device)))
    mine: list[float] = []
    other: list[float] = []
    for pair in range(pairs):
        order = [(ours, mine), (theirs, other)]
        for function, times in order if pair % 2 == 0 else reversed(order):
            times.append(seconds(function, calls, device))
    ratios = [b / a for a, b in zip(mine, other, strict=True)]
    return Comparison(statistics.median(mine), statistics.median(other), statistics.median(ratios), *interval(ratios), pairs, calls)


def hardware(device: str = "cpu") -> str:
    """The machine, in words."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    load = os.getloadavg()[0]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), load {load:.1f} at the start"
