"""The HTTP face over the real sampler, engine and experts, all in this process."""

import asyncio
import base64
import io
import json
import time

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from serve_app.api import create_app
from serve_app.keys import key_digests
from serve_app.limits import Limits

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def client(sampler):
    return TestClient(create_app(sampler), raise_server_exceptions=False)


def post(client, expect=200, **fields):
    response = client.post(PATH, json={"prompt": "red apple", **fields})
    assert response.status_code == expect, response.text
    return response.json()


def pixels(item):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))))


def check_error(response, status, code=None):
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert "Traceback" not in response.text
    if code:
        assert body["error"]["code"] == code
    return body["error"]


# -- pictures -----------------------------------------------------------------------------------------------------------


def test_the_answer_is_the_engines_picture(client, sampler):
    """The same bytes as the engine's own, run in this thread over freshly loaded experts."""
    from paris_ray.inference.engine import ImageRequest, generate

    body = post(client, seed=7, n=2, num_inference_steps=3, guidance_scale=2.5, routing="top-2", negative_prompt="blue")
    requests = [ImageRequest("red apple", "blue", 7, i, 3, 2.5, "top-2", "euler") for i in range(2)]
    for item, expected in zip(body["data"], generate(sampler.model, requests), strict=True):
        np.testing.assert_array_equal(pixels(item), expected.image)
        assert [step["t"] for step in item["routing"]] == pytest.approx([step["t"] for step in expected.routing])
        for step, other in zip(item["routing"], expected.routing, strict=True):
            assert step["weights"] == pytest.approx(other["weights"], abs=1e-5)
            assert sum(w > 0 for w in step["weights"]) == 2
    assert body["size"] == "16x16"
    assert body["model"] == "tiny"
    assert body["degraded"] == []
    assert abs(body["created"] - time.time()) < 60
    assert body["timings"]["total"] >= body["timings"]["sampler"] > 0


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_the_seed_is_echoed_and_decides_the_picture(client, seed):
    first, again = post(client, seed=seed), post(client, seed=seed)
    assert first["seed"] == first["data"][0]["seed"] == seed
    assert first["data"][0]["b64_json"] == again["data"][0]["b64_json"]


def test_a_drawn_seed_makes_the_picture_again(client):
    first, second = post(client), post(client)
    assert first["seed"] != second["seed"]
    assert post(client, seed=first["seed"])["data"] == first["data"]
    assert first["data"][0]["b64_json"] != second["data"][0]["b64_json"]


def test_three_pictures_differ_and_are_those_of_three_requests(client):
    three = post(client, seed=5, n=3)["data"]
    assert [item["index"] for item in three] == [0, 1, 2]
    assert len({item["b64_json"] for item in three}) == 3
    assert [post(client, seed=5, index=i)["data"][0] for i in range(3)] == three


@pytest.mark.parametrize(
    ("fields", "asked"),
    [({"num_inference_steps": 5}, 5), ({"solver": "heun", "num_inference_steps": 5}, 9), ({"routing": "full"}, 4), ({}, 4)],
)
def test_steps_and_solver_are_honoured(client, fields, asked):
    assert len(post(client, seed=1, **fields)["data"][0]["routing"]) == asked


@pytest.mark.parametrize("routing", ["top-1", "top-3", "threshold", "full", "caption", "expert-2"])
def test_routing_is_honoured_and_echoed(client, routing):
    body = post(client, seed=1, routing=routing)
    assert body["routing"] == routing
    weights = np.array([step["weights"] for step in body["data"][0]["routing"]])
    assert weights.sum(1) == pytest.approx(1.0, abs=1e-4)
    if routing == "expert-2":
        assert (weights[:, 2] == 1).all()
    if routing in ("top-1", "caption"):
        assert ((weights > 0).sum(1) == 1).all()


@pytest.mark.parametrize(
    "change",
    [{"guidance_scale": 9.0}, {"guidance_interval": [0.2, 0.6]}, {"negative_prompt": "leaves"},
     {"prompt": "blue boat"}, {"routing": "expert-0"}, {"routing": "expert-1"}, {"num_inference_steps": 6}, {"solver": "heun"}, {"index": 1}],
)  # fmt: skip
def test_every_field_changes_the_picture(client, change):
    assert post(client, seed=3, **change)["data"][0]["b64_json"] != post(client, seed=3)["data"][0]["b64_json"]


def test_guidance_interval_is_honoured(client, sampler):
    from paris_ray.inference.engine import ImageRequest, generate

    found = pixels(post(client, seed=3, guidance_scale=9.0, guidance_interval=[0.2, 0.6])["data"][0])
    request = ImageRequest("red apple", seed=3, guidance_scale=9.0, guidance_interval=(0.2, 0.6))
    np.testing.assert_array_equal(found, generate(sampler.model, [request])[0].image)
    assert not np.array_equal(found, pixels(post(client, seed=3, guidance_scale=9.0)["data"][0]))


@pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(client, name, kind):
    body = post(client, seed=3, output_format=name)
    image = Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"])))
    assert (image.format, image.size, body["output_format"]) == (kind, (16, 16), name)
    if name == "webp":
        np.testing.assert_array_equal(np.asarray(image), pixels(post(client, seed=3)["data"][0]))
    if name != "png":
        assert not {"parameters", "routing"} & set(image.info)


def test_a_png_says_what_it_was_made_from(client):
    prompt = "zażółć 🍎,\nSteps: 99 \x00"
    body = post(client, prompt=prompt, negative_prompt="ß", seed=11, index=2, guidance_scale=2.5, routing="top-1")
    image = Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"])))
    said = image.info["parameters"]
    assert said.startswith(prompt.replace("\0", "\ufffd") + "\nNegative prompt: ß\n")
    for part in (
        "Steps: 4",
        "Seed: 11",
        "Index: 2",
        "CFG scale: 2.5",
        "Routing: top-1",
        "Sampler: euler",
        "Model hash: tiny-fingerprint",
        "Model: tiny",
    ):
        assert part in said.splitlines()[-1]
    provenance = json.loads(image.info["routing"])
    assert provenance["steps"] == body["data"][0]["routing"]
    assert [e["objective"] for e in provenance["experts"]] == ["flow", "ddpm", "flow"]


def test_headers(client):
    response = client.post(PATH, json={"prompt": "x", "seed": 4, "routing": "full"})
    assert response.headers["x-paris-seed"] == "4"
    assert response.headers["x-paris-routing"] == "full"
    assert "x-paris-degraded" not in response.headers
    assert not [name for name in response.headers if name.startswith("access-control")]


# -- what is refused ----------------------------------------------------------------------------------------------------


def test_a_refusal_over_http(client):
    error = check_error(client.post(PATH, json={"prompt": "x", "n": 11}), 400, "invalid_value")
    assert error["param"] == "n"
    check_error(client.post(PATH, json={"prompt": "x", "model": "other"}), 404, "model_not_found")
    check_error(client.post(PATH, json={"prompt": "x", "foo": 1}), 400, "unknown_parameter")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_only_json_is_taken(client, kind):
    check_error(client.post(PATH, content=b'{"prompt": "x"}', headers={"content-type": kind}), 415, "unsupported_media_type")
    ok = client.post(PATH, content=b'{"prompt": "x", "seed": 1}', headers={"content-type": "Application/JSON; charset=utf-8"})
    assert ok.status_code == 200


def test_a_body_too_large_is_refused(client):
    big = json.dumps({"prompt": "x" * 100_000}).encode()
    check_error(client.post(PATH, content=big, headers={"content-type": "application/json"}), 413, "body_too_large")
    chunks = (big[i : i + 1000] for i in range(0, len(big), 1000))
    check_error(client.post(PATH, content=chunks, headers={"content-type": "application/json"}), 413, "body_too_large")


async def asgi(app, body, headers, after=None):
    """One request at the lowest level; ``after`` seconds later the client leaves."""
    sent, messages = [], [{"type": "http.request", "body": body[i : i + 4096], "more_body": True} for i in range(0, len(body), 4096)]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive():
        if messages:
            return messages.pop(0)
        await asyncio.sleep(3600 if after is None else after)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": PATH, "raw_path": PATH.encode(), "query_string": b"", "root_path": "", "scheme": "http",
             "http_version": "1.1", "headers": [(b"content-type", b"application/json"), *headers], "client": ("::1", 1)}  # fmt: skip
    await app(scope, receive, send)
    return sent


def test_a_content_length_that_lies_changes_nothing(sampler):
    for declared in (b"10", b"9" * 30, b"-1", b"x"):
        sent = asyncio.run(asgi(create_app(sampler), json.dumps({"prompt": "x" * 100_000}).encode(), [(b"content-length", declared)]))
        assert sent[0]["status"] == 413


def test_wrong_paths_and_methods(client):
    check_error(client.get("/nothing"), 404, "not_found")
    check_error(client.get("/v1/models/other"), 404, "model_not_found")
    check_error(client.get("/v1/models/a/b"), 404, "model_not_found")
    assert client.get(PATH).headers["allow"] == "POST"
    check_error(client.get(PATH), 405, "method_not_allowed")
    check_error(client.options(PATH, headers={"origin": "http://evil.example", "access-control-request-method": "POST"}), 405)
    check_error(client.post("/v1/images/generations/", json={"prompt": "x"}), 404)


def test_an_internal_error_tells_no_secrets(sampler):
    class Broken:
        card = staticmethod(sampler.card)

        async def generate(self, job):
            raise KeyError("secret")

    broken = TestClient(create_app(Broken()), raise_server_exceptions=False)
    error = check_error(broken.post(PATH, json={"prompt": "x"}), 500, "internal_error")
    assert "secret" not in error["message"]
    assert error["type"] == "server_error"


# -- load and leaving ---------------------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_again(small_sampler):
    async def many():
        transport = httpx.ASGITransport(create_app(small_sampler))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as http:
            return await asyncio.gather(*(http.post(PATH, json={"prompt": "x", "num_inference_steps": 20}) for _ in range(10)))

    responses = asyncio.run(many())
    codes = [response.status_code for response in responses]
    assert set(codes) == {200, 429}
    for response in responses:
        if response.status_code == 429:
            assert check_error(response, 429, "queue_full")["type"] == "rate_limit_error"
            assert int(response.headers["retry-after"]) >= 1


def test_a_request_that_the_queue_cannot_hold_leaves_nothing_behind(small_sampler):
    client = TestClient(create_app(small_sampler))
    check_error(client.post(PATH, json={"prompt": "x", "n": 10}), 429)
    assert client.post(PATH, json={"prompt": "x"}).status_code == 200
    assert (small_sampler.engine.metrics["queued"], small_sampler.engine.metrics["active"]) == (0, 0)


def test_a_client_that_leaves_frees_the_sampler(sampler):
    before = sampler.engine.metrics
    body = json.dumps({"prompt": "x", "n": 5, "num_inference_steps": 200}).encode()
    began = time.monotonic()
    sent = asyncio.run(asgi(create_app(sampler), body, [], after=0.1))
    assert sent[0]["status"] == 499
    while sampler.engine.metrics["active"] and time.monotonic() - began < 10:
        time.sleep(0.01)
    after = sampler.engine.metrics
    assert after["cancelled"] - before["cancelled"] == 5
    assert after["evaluations"] - before["evaluations"] < 1000


# -- the rest -----------------------------------------------------------------------------------------------------------


def test_models(client):
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    (model,) = body["data"]
    assert model == client.get("/v1/models/tiny").json()
    assert (model["id"], model["object"], model["size"], model["fingerprint"]) == ("tiny", "model", "16x16", "tiny-fingerprint")
    assert [(e["objective"], e["cluster_size"], e["state"]) for e in model["experts"]] == [
        ("flow", 40, "ready"),
        ("ddpm", 7, "ready"),
        ("flow", 13, "ready"),
    ]
    assert model["sampling"] == {"steps": 4, "guidance_scale": 2.0, "routing": "top-2", "solver": "euler"}
    assert model["limits"] == Limits().model_dump()
    assert model["attribution"] == "Pictures of nobody"


def test_health_and_page(client):
    assert client.get("/health/live").json() == {"status": "live"}
    assert client.get("/health/ready").json() == {"status": "ready", "experts": {"0": "ready", "1": "ready", "2": "ready"}}
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert "default-src 'none'" in page.headers["content-security-policy"]
    outside = page.text.replace("http://www.w3.org/2000/svg", "")
    assert "://" not in outside  # nothing is fetched from another host


def test_not_ready_while_the_sampler_is_away():
    class Away:
        async def card(self):
            await asyncio.sleep(60)

    away = TestClient(create_app(Away(), patience=0.05), raise_server_exceptions=False)
    assert away.get("/health/live").status_code == 200
    assert away.get("/health/ready").status_code == 503
    response = away.post(PATH, json={"prompt": "x"})
    check_error(response, 503, "not_ready")
    assert response.headers["retry-after"]


def test_an_expert_without_weights_is_masked_and_named(crippled_sampler):
    client = TestClient(create_app(crippled_sampler))
    response = client.post(PATH, json={"prompt": "x", "seed": 1, "routing": "full"})
    body = response.json()
    assert body["degraded"] == [1]
    assert response.headers["x-paris-degraded"] == "expert-1"
    assert all(step["weights"][1] == 0 and sum(step["weights"]) == pytest.approx(1, abs=1e-4) for step in body["data"][0]["routing"])
    assert client.get("/health/ready").json() == {"status": "ready", "experts": {"0": "ready", "1": "missing", "2": "ready"}}
    error = check_error(client.post(PATH, json={"prompt": "x", "routing": "expert-1"}), 503, "expert_unavailable")
    assert error["param"] == "routing"


KEYS = key_digests("first-key\nsecond-key")


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong-key", "Bearer", "Bearer ", "first-key", "Basic first-key", "Bearer first-ke", "Bearer first-key2", "Bearer \xff"]
)
def test_without_a_known_key_nothing_but_page_and_health(sampler, header):
    client = TestClient(create_app(sampler, key_digests=KEYS))
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    assert client.get("/", headers=headers).status_code == 200
    assert client.get("/health/live", headers=headers).status_code == 200
    assert client.get("/health/ready", headers=headers).status_code == 200
    for method, path in [("GET", "/v1/models"), ("POST", PATH), ("GET", "/openapi.json"), ("GET", "/nothing"), ("GET", "/health/live/")]:
        response = client.request(method, path, headers=headers)
        check_error(response, 401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("header", ["Bearer first-key", "bearer second-key"])
def test_with_a_known_key(sampler, header):
    client = TestClient(create_app(sampler, key_digests=KEYS), headers={"authorization": header})
    assert client.get("/v1/models").status_code == 200
    assert post(client, seed=1)["seed"] == 1
