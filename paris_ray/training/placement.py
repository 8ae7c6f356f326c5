"""Which training goes on which machine: the earliest end of the last one, and of the placements that reach it the cheapest. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST = 200_000
"""Partial placements that are looked at, a second or two; what has been found by then is taken."""


@dataclass(frozen=True)
class Spot:
    """Where and when one training runs.

    Attributes:
        kind: which kind of device.
        devices: which of that kind.
        begins: hours from the start of all.
        ends: hours from the start of all.
    """

    kind: int
    devices: tuple[int, ...]
    begins: float
    ends: float


@dataclass(frozen=True)
class Placement:
    """Of all trainings, in the order they were given.

    Attributes:
        spots: of each training.
        hours: when the last one ends.
        cost: of the devices, each from the start until its last training ends.
        exact: whether all placements were considered; otherwise a better one may exist.
    """

    spots: tuple[Spot, ...]
    hours: float
    cost: float
    exact: bool


def place(hours: Sequence[Sequence[float | None]], workers: Sequence[int], counts: Sequence[int], prices: Sequence[float]) -> Placement:
    """Branch and bound over trainings in the order of their length, the longest first.

    A training with several workers takes that many devices of one kind, all at once. With one worker each, the result is the best there is (unless
    :data:`MOST` ended the search); with several, the best of those that start longer trainings first.

    Args:
        hours: of training i on a device of kind m; ``None`` where it cannot run.
        workers: devices that training i takes.
        counts: devices of kind m.
        prices: of an hour of one device of kind m.

    Raises:
        ValueError: a training can run nowhere.
    """
    fastest = []
    for i, row in enumerate(hours):
        possible = [h for h, count in zip(row, counts, strict=True) if h is not None and count >= workers[i]]
        if not possible:
            raise ValueError(f"training {i} can run on no machine")
        fastest.append(min(possible))
    order = sorted(range(len(hours)), key=lambda i: -fastest[i])
    search = _Search(hours, workers, prices, order, fastest, [[0.0] * count for count in counts])
    search.descend(0)
    assert search.best is not None
    spots = dict(search.best)
    return Placement(tuple(spots[i] for i in range(len(hours))), *search.reached, exact=search.looked < MOST)


class _Search:
    def __init__(
        self,
        hours: Sequence[Sequence[float | None]],
        workers: Sequence[int],
        prices: Sequence[float],
        order: list[int],
        fastest: list[float],
        free: list[list[float]],
    ):
        self.hours, self.workers, self.prices, self.order, self.free = hours, workers, prices, order, free
        # Device hours that the trainings from one on take at least.
        left = [fastest[i] * workers[i] for i in order]
        self.left = [math.fsum(left[depth:]) for depth in range(len(order) + 1)]
        self.devices = sum(map(len, free))
        self.taken: list[tuple[int, Spot]] = []
        self.best: list[tuple[int, Spot]] | None = None
        self.reached = (math.inf, math.inf)
        self.looked = 0

    def descend(self, depth: int) -> None:
        self.looked += 1
        ends = max(map(max, filter(None, self.free)))
        cost = math.fsum(price * math.fsum(times) for price, times in zip(self.prices, self.free, strict=True))
        busy = math.fsum(math.fsum(times) for times in self.free)
        choices = self._choices(self.order[depth]) if depth < len(self.order) else []
        at_least = max(ends, (busy + self.left[depth]) / self.devices, min((spot.ends for spot in choices), default=0.0))
        if (round(at_least, 9), round(cost, 9)) >= self.reached:
            return
        if depth == len(self.order):
            self.best, self.reached = list(self.taken), (round(ends, 9), round(cost, 9))
            return
        for spot in choices:
            if self.best is not None and self.looked >= MOST:
                return
            times = self.free[spot.kind]
            before = [times[d] for d in spot.devices]
            for d in spot.devices:
                times[d] = spot.ends
            self.taken.append((self.order[depth], spot))
            self.descend(depth + 1)
            self.taken.pop()
            for d, then in zip(spot.devices, before, strict=True):
                times[d] = then

    def _choices(self, i: int) -> list[Spot]:
        """Where training i could go, the earliest end first; of devices that are alike, one."""
        found = []
        for kind, times in enumerate(self.free):
            lasts, n = self.hours[i][kind], self.workers[i]
            if lasts is None or len(times) < n:
                continue
            by_time, seen = sorted(range(len(times)), key=times.__getitem__), set()
            for last in range(n - 1, len(times)):
                # To begin when one device is free, the latest of those that are free by then: the earlier ones stay for others.
                devices = tuple(by_time[last - n + 1 : last + 1])
                if (state := tuple(times[d] for d in devices)) not in seen:
                    seen.add(state)
                    found.append(Spot(kind, devices, state[-1], state[-1] + lasts))
        return sorted(found, key=lambda spot: (spot.ends, self.prices[spot.kind]))
