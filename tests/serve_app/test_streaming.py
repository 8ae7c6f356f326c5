"""Pictures as server-sent events, over the real sampler, engine and experts."""

import asyncio
import base64
import io
import json
import time

import numpy as np
import pytest
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from PIL import Image
from starlette.testclient import TestClient

from serve_app import transport
from serve_app.api import create_app
from serve_app.deployments import preview_every
from serve_app.protocol import ApiError
from serve_app.work import Queued

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def client(sampler):
    return TestClient(create_app(sampler), raise_server_exceptions=False)


def events_of(text):
    """The events of a stream, read by the rules of its standard that matter here."""
    found = []
    for block in text.split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        if "" in lines:
            continue  # a comment
        data = json.loads(lines["data"])
        assert lines["event"] == data["type"]
        found.append(data)
    return found


def stream(client, **fields):
    response = client.post(PATH, json={"prompt": "red apple", "stream": True, **fields})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text)


def idle(sampler):
    """The engine's counts when it has nothing left, which takes it a tick."""
    end = time.monotonic() + 10
    while (counts := sampler.engine.metrics)["queued"] or counts["active"]:
        assert time.monotonic() < end, counts
        time.sleep(0.01)
    return counts


def pixels(event):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(event["b64_json"]))))


def test_events_have_openais_fields_and_the_pictures_bytes(client):
    """Their own models check the fields, strictly; the bytes are those of an answer in one piece."""
    fields = {"seed": 7, "n": 2, "num_inference_steps": 8, "routing": "top-2"}
    events = stream(client, partial_images=3, **fields)
    whole = client.post(PATH, json={"prompt": "red apple", **fields}).json()
    for index in range(2):
        mine = [event for event in events if event["index"] == index]
        assert [event["type"].rpartition(".")[2] for event in mine] == ["partial_image"] * 3 + ["completed"]
        assert [ImageGenPartialImageEvent.model_validate(event).partial_image_index for event in mine[:3]] == [0, 1, 2]
        done = ImageGenCompletedEvent.model_validate(mine[3])
        assert done.b64_json == whole["data"][index]["b64_json"]
        assert (done.size, done.output_format) == ("16x16", "png")
        assert mine[3]["routing"] == whole["data"][index]["routing"]
        assert abs(done.created_at - time.time()) < 60
        assert {event["seed"] for event in mine} == {7}


def test_previews_are_the_engines_estimates_at_a_quarter_a_half_and_three_quarters(client, sampler):
    from paris_ray.inference.engine import ImageRequest

    seen = []
    request = ImageRequest("red apple", seed=7, steps=8, routing="top-2")
    sampler.engine.submit(request, preview=seen.append, preview_every=1).result(60)
    events = stream(client, partial_images=3, seed=7, num_inference_steps=8, routing="top-2")
    for event, evaluation in zip(events[:3], (2, 4, 6), strict=True):
        (expected,) = [look.image for look in seen if look.evaluation == evaluation]
        np.testing.assert_array_equal(pixels(event), expected)


@pytest.mark.parametrize("fields", [{}, {"partial_images": 0}, {"partial_images": None}])
def test_without_previews_one_event_a_picture(client, fields):
    assert [event["type"] for event in stream(client, n=2, **fields)] == ["image_generation.completed"] * 2


def test_as_many_previews_as_asked_for_whenever_there_is_room():
    for evaluations in range(2, 120):
        for previews in range(1, 4):
            every = preview_every(evaluations, previews)
            assert len(range(every, evaluations, every)) >= min(previews, evaluations - 1)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"partial_images": 2}, "partial_images"), ({"stream": True, "partial_images": 4}, "partial_images"), ({"stream": 1}, "stream")],
)
def test_what_is_refused(client, fields, param):
    response = client.post(PATH, json={"prompt": "x", **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_what_cannot_begin_has_a_status_of_its_own(small_sampler):
    full = TestClient(create_app(small_sampler)).post(PATH, json={"prompt": "x", "n": 10, "stream": True})
    assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
    assert int(full.headers["retry-after"]) >= 1
    idle(small_sampler)


def test_an_error_under_way_is_the_last_event(crippled_sampler):
    """The stream has begun when the engine finds that its only expert is not there."""
    body = stream(TestClient(create_app(crippled_sampler)), routing="expert-1")
    (event,) = body
    assert event["type"] == "error"
    assert set(event["error"]) == {"message", "type", "param", "code"}
    assert (event["error"]["code"], event["error"]["param"]) == ("expert_unavailable", "routing")


def test_an_internal_error_under_way_tells_no_secrets(sampler):
    class Broken:
        card = staticmethod(sampler.card)

        async def stream(self, job):
            yield Queued()
            raise KeyError("secret")

    (event,) = stream(TestClient(create_app(Broken())))
    assert event["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(event)


async def leave_after(app, body, leave):
    """One request at the lowest level; the client leaves when it was sent so many bodies."""
    sent, gone = [], asyncio.Event()
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive():
        if messages:
            return messages.pop(0)
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)
        if len([m for m in sent if m["type"] == "http.response.body"]) >= leave:
            gone.set()

    scope = {"type": "http", "method": "POST", "path": PATH, "raw_path": PATH.encode(), "query_string": b"", "root_path": "", "scheme": "http",
             "http_version": "1.1", "headers": [(b"content-type", b"application/json")], "client": ("::1", 1)}  # fmt: skip
    await asyncio.wait_for(app(scope, receive, send), 30)
    return sent


@pytest.mark.parametrize("leave", [0, 1])
def test_a_client_that_leaves_at_the_start_or_after_a_preview_frees_the_sampler(sampler, leave):
    before = sampler.engine.metrics
    asked = {"prompt": "x", "n": 5, "num_inference_steps": 200, "stream": True, "partial_images": 3}
    sent = asyncio.run(leave_after(create_app(sampler), asked, leave=leave))
    assert sent[0]["status"] == 200
    assert [b"partial_image" in message["body"] for message in sent[1 : 1 + leave]] == [True] * leave
    after = idle(sampler)
    assert after["cancelled"] - before["cancelled"] == 5
    assert after["evaluations"] - before["evaluations"] < 1000


def test_a_stream_that_waits_gives_signs_of_life(sampler, monkeypatch):
    monkeypatch.setattr(transport, "HEARTBEAT_SECONDS", 0.02)

    class Slow:
        card = staticmethod(sampler.card)

        async def stream(self, job):
            yield Queued()
            await asyncio.sleep(0.2)
            raise ApiError(503, "stopping")

    response = TestClient(create_app(Slow())).post(PATH, json={"prompt": "x", "stream": True})
    assert response.text.count(": still working\n\n") >= 2
    assert [event["type"] for event in events_of(response.text)] == ["error"]
