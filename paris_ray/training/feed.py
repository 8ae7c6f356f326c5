"""The batches of a training in their order, prepared while the device works, and how long the loop waits for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

Batch = dict[str, Tensor]


def feed(prepare: Callable[[int], Batch], starts: range, ahead: int) -> Iterator[Batch]:
    """Batches in order; with ``ahead`` > 0 a thread prepares that many while the device works (on a CPU it would only take turns with it)."""
    if ahead == 0:
        yield from map(prepare, starts)
        return
    with ThreadPoolExecutor(1) as pool:
        pending: deque[Future[Batch]] = deque()
        for start in starts:
            pending.append(pool.submit(prepare, start))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class Clock:
    """Seconds of an interval, and how many of them went by waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin an interval."""
        self.start, self.waited, self.carried = time.monotonic(), 0.0, 0.0

    def carry(self, seconds: float, waited: float) -> None:
        """Count what an earlier process spent in this interval."""
        self.restart()
        self.carried, self.waited = seconds, waited

    def seconds(self) -> float:
        """So far."""
        return time.monotonic() - self.start + self.carried

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, counting how long each one was waited for."""
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - asked
            if batch is None:
                return
            yield batch
