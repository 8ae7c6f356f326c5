"""Pictures that wait for a place in the engine: clients take turns, and share the queue."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from paris_ray.inference.request import EngineFull, ImageResult
from paris_ray.inference.rows import Ticket

WANTS_SECONDS = 60.0
"""For so long one who was refused counts as wanting a share of the queue: as long as he may have been told to stay away."""


class Waiting:
    """Tickets by client, the next client first. Not thread-safe; its owner locks.

    One client alone may fill the queue. When that has cost another one a place, each of those who wait or were refused lately may have for a while
    its share and no more: who asks often would otherwise leave nothing to who asks seldom.

    Args:
        limit: tickets in all.
        clock: seconds.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic):
        self.limit, self.clock = limit, clock
        self._queues: OrderedDict[str, deque[Ticket]] = OrderedDict()
        self._refused: dict[str, float] = {}  # client → when

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def add(self, ticket: Ticket, together: int = 1) -> None:
        """Let a ticket wait, the first of so many of its client's that come together. Raises EngineFull unless there is room for all of them."""
        client, now = ticket.request.client, self.clock()
        self._refused = {name: when for name, when in self._refused.items() if now - when < WANTS_SECONDS}
        wanting = self._refused.keys() | self._queues.keys() | {client}
        share, own = max(1, self.limit // len(wanting)), len(self._queues.get(client, ()))
        if len(self) + together > self.limit or (own + together > share and self._refused.keys() - {client}):
            self._refused[client] = now
            yours = f"; of yours {own}, whose share is {share}" if len(wanting) > 1 else ""
            # Otherwise it would come again and again in vain.
            fewer = f" and ask for at most {share} at once" if together > share else ""
            raise EngineFull(f"{len(self)} pictures wait already, of {self.limit} that may{yours}; try again later{fewer}")
        self._queues.setdefault(client, deque()).append(ticket)

    def take(self, count: int) -> list[Ticket]:
        """Up to so many, a client's one after another's."""
        tickets: list[Ticket] = []
        while self._queues and len(tickets) < count:
            client, queue = self._queues.popitem(last=False)
            tickets.append(queue.popleft())
            if queue:
                self._queues[client] = queue
        return tickets

    def ahead(self, future: Future[ImageResult]) -> int | None:
        """How many will be taken before the picture of a future, as things stand; None if it does not wait."""
        return next((number for number, ticket in enumerate(self._in_turn()) if ticket.future is future), None)

    def _in_turn(self) -> Iterator[Ticket]:
        queues = [list(queue) for queue in self._queues.values()]
        for turn in range(max(map(len, queues), default=0)):
            yield from (queue[turn] for queue in queues if turn < len(queue))

    def drop_cancelled(self) -> list[Ticket]:
        """Let those go that were cancelled."""
        gone = []
        for client, queue in list(self._queues.items()):
            for ticket in [ticket for ticket in queue if ticket.future.cancelled()]:
                queue.remove(ticket)
                gone.append(ticket)
            if not queue:
                del self._queues[client]
        return gone

    def clear(self) -> list[Ticket]:
        """Let all go."""
        tickets = [ticket for queue in self._queues.values() for ticket in queue]
        self._queues.clear()
        return tickets
