"""What surrounds a request: turns of clients, ids, limits on headers, errors of one shape."""

import asyncio
import json
import re

import httpx
import pytest
from starlette.testclient import TestClient

from serve_app.api import create_app
from serve_app.keys import key_digests
from serve_app.limits import Limits
from serve_app.protocol import ApiError
from serve_app.turns import Turns
from serve_app.work import Outcome, Queued

PATH = "/v1/images/generations"


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def take(turns, client, images):
    turn = turns.take(client)
    try:
        turn.charge(images)
    except ApiError:
        turn.end(served=False)
        raise
    return turn


def refusal(turns, client, images=1):
    with pytest.raises(ApiError) as caught:
        take(turns, client, images)
    assert (caught.value.status, caught.value.type) == (429, "rate_limit_error")
    return caught.value


# -- turns, by themselves -----------------------------------------------------------------------------------------------


def test_a_minutes_worth_at_once_and_then_one_every_five_seconds():
    clock = Clock()
    turns = Turns(Limits(images_per_minute=12), clock)
    for _ in range(12):
        take(turns, "a", 1).end()
    assert refusal(turns, "a").retry_after == 5
    assert refusal(turns, "a", 3).retry_after == 15
    clock.now += 4.9
    refusal(turns, "a")
    clock.now += 0.2
    take(turns, "a", 1).end()
    refusal(turns, "a")
    clock.now += 3600  # what is saved up is a minute's worth
    take(turns, "a", 10).end()
    refusal(turns, "a", 3)


def test_who_comes_again_after_retry_after_is_let_through():
    for gone in (0.0, 0.3, 1.7, 4.99):
        clock = Clock()
        turns = Turns(Limits(images_per_minute=13), clock)
        take(turns, "a", 10).end()
        clock.now += gone
        clock.now += refusal(turns, "a", 10).retry_after
        take(turns, "a", 10).end()


def test_clients_do_not_share():
    turns = Turns(Limits(images_per_minute=10, requests_at_once=1), Clock())
    take(turns, "a", 10)
    take(turns, "b", 10)
    assert refusal(turns, "a").code == "too_many_requests_at_once"


def test_requests_at_once():
    turns = Turns(Limits(requests_at_once=2), Clock())
    first, second = take(turns, "a", 10), take(turns, "a", 10)
    assert refusal(turns, "a").code == "too_many_requests_at_once"
    first.end()
    first.end()  # once
    take(turns, "a", 10)
    refusal(turns, "a")
    second.end()


def test_what_the_server_refused_costs_nothing():
    turns = Turns(Limits(images_per_minute=10), Clock())
    take(turns, "a", 10).end(served=False)
    take(turns, "a", 10).end()
    refusal(turns, "a")


def test_addresses_are_not_remembered_for_ever(monkeypatch):
    monkeypatch.setattr("serve_app.turns.FORGET_ABOVE", 50)
    clock = Clock()
    turns = Turns(Limits(images_per_minute=10), clock)
    take(turns, "spent", 10).end()
    for number in range(1000):
        take(turns, f"client-{number}", 1).end()
        clock.now += 10
        if number == 2:
            refusal(turns, "spent", 9)
    assert len(turns._clients) <= 52


def test_a_rate_that_lets_some_requests_never_through_is_refused():
    with pytest.raises(ValueError, match="images_per_minute 5 is less than max_images_per_request 10"):
        Limits(images_per_minute=5)
    Limits(images_per_minute=5, max_images_per_request=5)


# -- over HTTP ----------------------------------------------------------------------------------------------------------


def test_rate_per_key(sampler):
    limits = Limits(images_per_minute=3, max_images_per_request=3)
    client = TestClient(create_app(sampler, limits, key_digests("first-key\nsecond-key")))

    def ask(key, **fields):
        body = {"prompt": "x", "num_inference_steps": 1, **fields}
        return client.post(PATH, json=body, headers={"authorization": f"Bearer {key}"})

    assert ask("first-key", n=2).status_code == 200
    assert ask("first-key", n=2, routing="nonsense").status_code == 400  # costs nothing
    assert ask("first-key", stream=True).status_code == 200
    response = ask("first-key")
    assert response.status_code == 429
    assert response.json()["error"]["code"] == "rate_limit_exceeded"
    assert 15 <= int(response.headers["retry-after"]) <= 20
    assert ask("second-key", n=3).status_code == 200


def headers_of(values):
    return [("content-type", "application/json"), *(("authorization", value) for value in values)]


def test_a_key_is_one_client_however_it_is_written(sampler):
    """What counts is the key that was compared, not the header's text."""
    app = create_app(sampler, Limits(images_per_minute=3, max_images_per_request=3), key_digests("first-key"))
    client, body = TestClient(app), json.dumps({"prompt": "x", "num_inference_steps": 1})
    written = ["Bearer first-key", "bearer  first-key", "Bearer \tfirst-key", "Bearer \t\tfirst-key", "Bearer first-key\t"]
    assert [client.post(PATH, content=body, headers=headers_of([one])).status_code for one in written] == [200] * 3 + [429] * 2


def test_two_authorization_headers_are_refused(sampler):
    client = TestClient(create_app(sampler, key_digests=key_digests("first-key")))
    for values in (["Bearer anything-1", "Bearer first-key"], ["Bearer first-key", "Bearer anything-1"], ["Bearer first-key"] * 2):
        response = client.post(PATH, content=b'{"prompt": "x"}', headers=headers_of(values))
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")


def test_a_request_whose_body_is_still_coming_is_one_of_those_at_once(sampler):
    async def talk():
        begun, go = asyncio.Event(), asyncio.Event()

        async def slow_body():
            yield b'{"prompt": "x", '
            begun.set()
            await go.wait()
            yield b'"num_inference_steps": 1}'

        transport = httpx.ASGITransport(create_app(sampler, Limits(requests_at_once=1)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers={"content-type": "application/json"}) as http:
            first = asyncio.ensure_future(http.post(PATH, content=slow_body()))
            await begun.wait()
            second = await http.post(PATH, content=b'{"prompt": "x", "num_inference_steps": 1}')
            go.set()
            return second, await first, await http.post(PATH, content=b"{}"), await http.post(PATH, content=b"{}")

    second, first, *wrong = asyncio.run(talk())
    assert (second.status_code, second.json()["error"]["code"], first.status_code) == (429, "too_many_requests_at_once", 200)
    assert [response.status_code for response in wrong] == [400, 400]  # and a refused one has ended


class Slow:
    """Says when it works, and works until it is let go."""

    def __init__(self, sampler):
        self.card, self.working, self.go = sampler.card, 0, asyncio.Event()

    async def stream(self, job):
        self.working += 1
        yield Queued()
        await self.go.wait()

    async def generate(self, job):
        self.working += 1
        await self.go.wait()
        return Outcome((), (), {})


@pytest.mark.parametrize("stream", [False, True])
def test_requests_at_once_over_http(sampler, stream):
    async def talk():
        slow = Slow(sampler)
        transport = httpx.ASGITransport(create_app(slow, Limits(requests_at_once=2)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            asked = {"prompt": "x", "stream": stream}
            running = [asyncio.ensure_future(http.post(PATH, json=asked)) for _ in range(2)]
            while slow.working < 2:
                await asyncio.sleep(0.01)
            third = await http.post(PATH, json=asked)
            slow.go.set()
            done = await asyncio.gather(*running)
            return third, done, await http.post(PATH, json=asked)

    third, done, after = asyncio.run(talk())
    assert (third.status_code, third.headers["retry-after"]) == (429, "1")
    assert [response.status_code for response in [*done, after]] == [200] * 3


@pytest.fixture(scope="module")
def client(sampler):
    return TestClient(create_app(sampler, key_digests=key_digests("first-key")), headers={"authorization": "Bearer first-key"})


ONE_OF_EACH = [
    ("GET", "/health/live", {}, 200),
    ("GET", "/nothing", {}, 404),
    ("GET", PATH, {}, 405),
    ("POST", PATH, {"json": {}}, 400),
    ("POST", PATH, {"content": b"x" * 100_000, "headers": {"content-type": "application/json"}}, 413),
    ("POST", PATH, {"content": b"x"}, 415),
    ("GET", "/v1/models", {"headers": {"authorization": "Bearer wrong"}}, 401),
    ("GET", "/v1/models", {"headers": {"x-long": "x" * 20_000}}, 431),
]


@pytest.mark.parametrize(("method", "path", "more", "status"), ONE_OF_EACH)
def test_every_answer_has_an_id_and_every_error_one_shape(client, method, path, more, status):
    response = client.request(method, path, **more)
    assert response.status_code == status
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])
    if status != 200:
        assert set(response.json()) == {"error"}
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize(("given", "kept"), [("my-id:1.2_3", True), ("a" * 128, True), ("a" * 129, False), ("two words", False), ("<b>", False)])
def test_the_clients_id_is_kept_if_it_is_a_word(client, given, kept):
    found = client.get("/health/live", headers={"x-request-id": given}).headers["x-request-id"]
    assert (found == given) is kept
    assert found


def test_an_internal_error_is_found_in_the_log_by_its_id(sampler, caplog):
    class Broken:
        card = staticmethod(sampler.card)

        async def generate(self, job):
            raise KeyError("secret")

        async def stream(self, job):
            yield Queued()
            raise KeyError("secret")

    broken = TestClient(create_app(Broken()))
    for asked in ({"prompt": "x"}, {"prompt": "x", "stream": True}):
        caplog.clear()
        response = broken.post(PATH, json=asked, headers={"x-request-id": "find-me"})
        assert response.headers["x-request-id"] == "find-me"
        assert "find-me" in response.text
        assert "secret" not in response.text
        assert "find-me" in caplog.text
        assert "secret" in caplog.text


def test_timings_are_in_a_header(client):
    response = client.post(PATH, json={"prompt": "x"})
    said = dict(part.split("=") for part in response.headers["x-paris-timings"].split(","))
    assert {phase: float(seconds) for phase, seconds in said.items()} == json.loads(response.text)["timings"]
    assert set(said) == {"sampler", "total"}
