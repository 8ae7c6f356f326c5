"""How much each client may have: pictures a minute, and requests at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from serve_app.limits import Limits
from serve_app.protocol import ApiError

FORGET_ABOVE = 4096
"""So many clients are remembered; beyond, those who are owed nothing are forgotten."""


@dataclass
class _Client:
    # Pictures that it may have now, as of ``since``; it fills up to a minute's worth.
    left: float
    since: float
    running: int = 0


class Turns:
    """Counts what clients use; of one thread.

    Args:
        limits: ``images_per_minute`` and ``requests_at_once`` of each client.
        clock: seconds.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self.per_minute, self.at_once, self.clock = limits.images_per_minute, limits.requests_at_once, clock
        self._clients: dict[str, _Client] = {}

    def take(self, name: str) -> Turn:
        """Begin a request of a client, of which nothing more is known yet.

        Raises:
            ApiError: status 429, when too many of this client's are under way.
        """
        now = self.clock()
        if len(self._clients) > FORGET_ABOVE:
            self._clients = {key: one for key, one in self._clients.items() if one.running or self._left(one, now) < (self.per_minute or 0)}
        client = self._clients.setdefault(name, _Client(self.per_minute or 0, now))
        if self.at_once is not None and client.running >= self.at_once:
            message = f"{client.running} requests of yours are under way, the most that may be at once; wait for one of them."
            raise ApiError(429, message, "rate_limit_error", code="too_many_requests_at_once", retry_after=1)
        client.running += 1
        return Turn(self, client)

    def _charge(self, client: _Client, images: int) -> None:
        if self.per_minute is None:
            return
        now = self.clock()
        client.left, client.since = self._left(client, now), now
        if client.left < images:
            wait = math.ceil((images - client.left) * 60 / self.per_minute)
            message = f"{images} pictures are more than your limit of {self.per_minute} a minute lets through now; come again in {wait} s."
            raise ApiError(429, message, "rate_limit_error", code="rate_limit_exceeded", retry_after=wait)
        client.left -= images

    def _left(self, client: _Client, now: float) -> float:
        most = self.per_minute or 0
        return min(most, client.left + (now - client.since) * most / 60)


class Turn:
    """A request under way."""

    def __init__(self, turns: Turns, client: _Client):
        self._turns, self._client, self._images, self._open = turns, client, 0, True

    def charge(self, images: int) -> None:
        """Count its pictures, once they are known.

        Raises:
            ApiError: status 429, with the seconds after which they would be let through.
        """
        self._turns._charge(self._client, images)
        self._images = images

    def end(self, served: bool = True) -> None:
        """End it, once; a request that the server refused after all costs no pictures."""
        if self._open:
            self._open = False
            self._client.running -= 1
            if not served:
                self._client.left += self._images
