"""The queue by itself: turns, shares, places."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from paris_ray.inference import waiting
from paris_ray.inference.request import EngineFull
from paris_ray.inference.waiting import Waiting


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def ticket(client):
    return SimpleNamespace(request=SimpleNamespace(client=client), future=Future())


def fill(queue, client, count):
    for _ in range(count):
        queue.add(ticket(client))


def test_one_client_alone_may_fill_it():
    queue = Waiting(8)
    fill(queue, "a", 8)
    with pytest.raises(EngineFull, match="8 pictures wait already, of 8 that may; try"):
        queue.add(ticket("a"))


def test_who_was_refused_gets_a_place_before_the_one_who_has_them_all():
    clock = Clock()
    queue = Waiting(8, clock)
    fill(queue, "greedy", 8)
    with pytest.raises(EngineFull, match="of yours 0, whose share is 4"):
        queue.add(ticket("modest"))
    queue.take(2)
    with pytest.raises(EngineFull, match="of yours 6, whose share is 4"):
        queue.add(ticket("greedy"))
    fill(queue, "modest", 2)
    queue.take(8)
    with pytest.raises(EngineFull, match="of yours 4, whose share is 4"):
        fill(queue, "greedy", 5)
    clock.now += waiting.WANTS_SECONDS
    fill(queue, "greedy", 4)  # nobody else has wanted a place for long


def test_a_job_is_taken_whole_or_not_at_all_and_told_how_much_would_be():
    queue = Waiting(8)
    with pytest.raises(EngineFull, match="ask for at most 8 at once"):
        queue.add(ticket("a"), together=9)
    queue.add(ticket("a"), together=8)  # alone all of it
    fill(queue, "a", 7)
    with pytest.raises(EngineFull, match=r"try again later$"):
        queue.add(ticket("b"), together=2)
    queue.take(8)
    with pytest.raises(EngineFull, match="whose share is 4; try again later and ask for at most 4 at once"):
        queue.add(ticket("a"), together=5)
    assert len(queue) == 0
    queue.add(ticket("a"), together=4)


@pytest.mark.parametrize("attempts", [(10, 1), (50, 5), (3, 3)])
def test_two_clients_get_alike_however_often_they_ask(attempts):
    """A server that takes two pictures a round, and clients that ask so often a round: who takes no notice of refusals gains nothing."""
    queue, taken = Waiting(16), Counter()
    for _ in range(400):
        for client, often in zip("ab", attempts, strict=True):
            for _ in range(often):
                try:
                    queue.add(ticket(client))
                except EngineFull:
                    pass
        taken.update(one.request.client for one in queue.take(2))
    assert taken.total() == 800
    assert max(taken.values()) / min(taken.values()) < 1.05


def test_places_are_the_order_in_which_they_are_taken():
    queue = Waiting(20)
    tickets = [ticket(client) for client in "aaabcbcca"]
    for one in tickets:
        queue.add(one)
    told = [queue.ahead(one.future) for one in tickets]
    order = queue.take(20)
    assert [order.index(one) for one in tickets] == told
    assert queue.ahead(tickets[0].future) is None
