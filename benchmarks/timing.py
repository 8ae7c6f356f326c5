"""Two functions timed against each other: alternating blocks, ratios of pairs, the median with its interval."""

from __future__ import annotations

import datetime
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from benchmarks import alternating
from benchmarks.alternating import alternate, interval

LEAST_PAIRS = 9


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


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def seconds(function: Callable[[], object], calls: int, device: str = "cpu") -> float:
    """Seconds of one call, from a block of calls."""
    wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    wait(device)
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
    times = alternate([{"ours": lambda: seconds(ours, calls, device), "theirs": lambda: seconds(theirs, calls, device)}] * pairs)
    mine, other = times["ours"], times["theirs"]
    ratios = [b / a for a, b in zip(mine, other, strict=True)]
    return Comparison(median(mine), median(other), median(ratios), *interval(ratios), pairs, calls)


def hardware(device: str = "cpu") -> str:
    """Date and machine, in words."""
    if device == "cpu":
        return alternating.hardware(torch.get_num_threads())
    return f"{datetime.date.today()} · {torch.cuda.get_device_name()} · Python {platform.python_version()}"
