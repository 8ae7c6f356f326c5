"""The ingress's side of Serve, with a sampler that is pretended: its deaths, a full queue, the contact sheets."""

import asyncio

import numpy as np
import pytest
from ray.exceptions import RayActorError, RayTaskError

from serve_app import ingress
from serve_app.ingress import Api, HandleSampler
from serve_app.limits import Limits
from serve_app.protocol import ApiError
from serve_app.work import Finished, Job, Picture, Queued

JOB = Job("x", "", 1, 0, 0, 4, 2.0, "full", "euler")
DONE = Finished(Picture(np.zeros((2, 2, 3), np.uint8), 0, (), np.zeros((0, 3), np.float32)), (), 0.1)


def died():
    return RayActorError()


def full():
    return RayTaskError("stream", "", ApiError(429, "The server is busy.", "rate_limit_error", code="queue_full", retry_after=1))


class Response:
    """What a handle's call answers: events, the last of which may be an error."""

    def __init__(self, events):
        self.events = iter(events)

    def __aiter__(self):
        return self

    async def __anext__(self):
        event = next(self.events, None)
        if event is None:
            raise StopAsyncIteration
        if isinstance(event, Exception):
            raise event
        return event

    def __await__(self):
        yield from asyncio.sleep(0).__await__()

    def cancel(self):
        pass


class Handle:
    """A sampler whose calls go as the test says, the last way for ever after."""

    def __init__(self, *calls):
        self.calls, self.asked = list(calls), 0
        self.stream = self.card = self

    def options(self, stream):
        called = Handle()
        called.stream = called
        called.remote = self.streamed
        return called

    def streamed(self, job):
        self.asked += 1
        return Response(self.calls.pop(0) if len(self.calls) > 1 else self.calls[0])

    def remote(self):
        return Response([])


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(ingress, "FULL_SECONDS", 0.01)
    monkeypatch.setattr(ingress, "RECOVERY_SECONDS", 0.3)


def test_a_job_whose_sampler_died_waits_for_a_place_in_the_next_ones_queue():
    """It was accepted: that all the others come at the same time is no reason to refuse it now."""
    handle = Handle([Queued(), died()], [full()], [full()], [full()], [Queued(), DONE])
    assert asyncio.run(HandleSampler(handle).generate(JOB)).pictures == (DONE.picture,)
    assert handle.asked == 5


def test_it_does_not_wait_for_ever():
    handle = Handle([Queued(), died()], [full()])
    with pytest.raises(ApiError) as caught:
        asyncio.run(HandleSampler(handle).generate(JOB))
    assert caught.value.code == "queue_full"
    assert 3 < handle.asked < 12


def test_a_job_that_had_no_place_yet_is_refused_at_once():
    handle = Handle([full()])
    with pytest.raises(ApiError, match="busy"):
        asyncio.run(HandleSampler(handle).generate(JOB))
    assert handle.asked == 1


def test_a_second_death_is_the_last():
    handle = Handle([Queued(), died()], [full()], [Queued(), died()])
    with pytest.raises(ingress.SamplerDied):
        asyncio.run(HandleSampler(handle).generate(JOB))
    assert handle.asked == 3


def test_contact_sheets_that_cannot_be_had_stop_nobody(tmp_path, monkeypatch):
    (tmp_path / "contact-0.png").write_bytes(b"a picture")

    def shown(clusters):
        app = Api(None, Limits(), clusters=clusters).__serve_build_asgi_app__()
        return app, Api(None, Limits(), clusters=clusters)._has_sheets()

    assert shown(str(tmp_path))[1]
    assert not shown(None)[1]

    def away(self, name):
        raise OSError("the store does not answer")

    monkeypatch.setattr(ingress.Folder, "exists", away)
    app, there = shown(str(tmp_path))
    assert app.title == "paris_ray"
    assert not there
