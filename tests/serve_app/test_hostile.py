"""What hostile and careless clients send: always an answer of the one shape, never a 5xx; and every parameter does something or is refused."""

import asyncio
import base64
import io
from collections import Counter

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, negative_data_rejection, response_schema_conformance
from starlette.testclient import TestClient

from serve_app import transport
from serve_app.api import create_app
from serve_app.keys import OPEN_PATHS, key_digests
from serve_app.limits import Limits
from serve_app.protocol import UNSUPPORTED, GenerationRequest

PATH = "/v1/images/generations"
SMALL = Limits(max_images_per_request=2, max_steps=4, max_image_steps=8)


@pytest.fixture(scope="module")
def app(sampler):
    return create_app(sampler, SMALL)


@pytest.fixture(scope="module")
def client(app):
    return TestClient(app, raise_server_exceptions=False)


def send(client, body, **headers):
    return client.post(PATH, content=body, headers={"content-type": "application/json", **headers})


def check_refused(response):
    assert 400 <= response.status_code < 500, response.text[:300]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(response.text) < 2000
    return error


# -- keys ---------------------------------------------------------------------------------------------------------------


def test_no_route_but_pages_and_health_answers_without_a_key(sampler):
    """Over all routes that there are, whoever adds one."""
    app = create_app(sampler, key_digests=key_digests("first-key"))
    client = TestClient(app)
    asked = [(method, route.path.replace("{model:path}", "tiny")) for route in app.routes for method in route.methods]
    assert len(asked) > 8
    for method, path in asked:
        status = client.request(method, path).status_code
        assert status == 401 or path in OPEN_PATHS, (method, path)
    # What is open says nothing of the model.
    for path in OPEN_PATHS - {"/health/ready"}:
        assert "tiny" not in client.get(path).text


# -- bodies -------------------------------------------------------------------------------------------------------------

HUGE = "9" * 4000
VALUES = {
    "num_inference_steps": ["0", "-1", "5", "1.5", "1e3", HUGE, '"3"', "true", "[3]"],
    "n": ["0", "-1", "3", "1.0", HUGE, '"1"', "false", "{}"],
    "guidance_scale": ["NaN", "Infinity", "-Infinity", "1e999", "0.5", "51", '"2"'],
    "seed": ["-1", str(2**63), "1.5", "NaN", '"7"'],
    "size": ['"100000x10000"', '"0x0"', '"16x"', '"x16"', '"16x16x16"', '"-16x-16"', '"１６x１６"', '"16X16"', f'"{HUGE}"', "16", "[16, 16]"],
    "guidance_interval": ["[]", "[0.1]", "[0.9, 0.1]", "[0, 2]", "[0, NaN]", "0.5"],
    "routing": ['""', '"top-0"', '"top-4"', f'"top-{HUGE}"', '"expert-3"', '"expert--1"', '"Top-1"', '"full "', '"oracle"', "2", f'"{HUGE}"'],
    "prompt": ['""', "null", "3", '["x"]', '{"x": "y"}', f'"{HUGE}9"'],
    "index": ["-1", str(2**31), HUGE],
    "partial_images": ["1", "4", "-1"],
    "y" * 9000: ["1"],
}
"""JSON text of values that are refused, by field."""
BODIES = {
    "empty": b"",
    "blank": b"   ",
    "half an object": b'{"prompt": "x"',
    "an array": b"[]",
    "null": b"null",
    "a number": b"12",
    "deep arrays": b"[" * 60_000,
    "deep objects": b'{"prompt":' * 6_000,
    "deep in a field": b'{"prompt": "x", "n": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "half a surrogate pair": b'{"prompt": "\\ud800"}',
    "half a surrogate pair elsewhere": b'{"prompt": "x", "negative_prompt": "\\udfff"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"prompt": "x"}',
    "no prompt": b"{}",
    "index and n": f'{{"prompt": "x", "index": {2**31 - 1}, "n": 2}}'.encode(),
} | {
    f"{name[:20]} {value[:20]}": f'{{"prompt": "x", "{name}": {value}}}'.replace('"prompt": "x", "prompt"', '"prompt"').encode()
    for name, values in VALUES.items() for value in values
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_refused(client, name):
    check_refused(send(client, BODIES[name]))


@pytest.mark.parametrize("prompt", ["\0", "\x1b[31m\r\n", "\u202e\ufeff", "👩‍👩‍👧‍👦" * 50, "𝔞" * 1000, "'; DROP TABLE", "\ufffe\uffff", "a" * 4000])
def test_prompts_of_any_text_are_drawn(client, prompt):
    for more in ({}, {"stream": True}, {"output_format": "webp"}):
        response = client.post(PATH, json={"prompt": prompt, "negative_prompt": prompt, "num_inference_steps": 1, **more})
        assert response.status_code == 200, response.text[:300]
        assert "error" not in response.text[:200]


class Endless:
    """A body that goes on; counts what was taken of it."""

    def __init__(self, chunk, pause=0.0):
        self.chunk, self.pause, self.taken = chunk, pause, 0

    async def __aiter__(self):
        while self.taken < 200_000_000:
            await asyncio.sleep(self.pause)
            self.taken += len(self.chunk)
            yield self.chunk


def talk(app, body, headers=None):
    async def one():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            return await http.post(PATH, content=body, headers={"content-type": "application/json", **(headers or {})})

    return asyncio.run(one())


def test_a_body_of_ten_megabytes_is_not_read(app):
    body = Endless(b"x" * 65_536)
    assert check_refused(talk(app, body))["code"] == "body_too_large"
    assert body.taken < 1_000_000
    body = Endless(b"x" * 65_536)
    assert check_refused(talk(app, body, {"content-length": str(10 * 1024 * 1024)}))["code"] == "body_too_large"
    assert body.taken == 0


def test_a_body_that_comes_byte_by_byte_is_not_waited_for(app, monkeypatch):
    monkeypatch.setattr(transport, "BODY_SECONDS", 0.2)
    response = talk(app, Endless(b" ", pause=0.02))
    assert response.status_code == 408
    assert check_refused(response)["code"] == "body_too_slow"


ODD = [("GET", "/v1/models/%00"), ("GET", "/v1/models/..%2f..%2fetc%2fpasswd"), ("GET", "/v1/models/" + "x" * 4000), ("GET", "/static/index.html"),
       ("DELETE", PATH), ("TRACE", "/"), ("POST", "/experts"), ("GET", "/v1/models?x=" + "y" * 4000)]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ODD)
def test_odd_paths_and_methods(client, method, path):
    response = client.request(method, path)
    assert response.status_code < 500
    if response.status_code != 200:
        check_refused(response)


# -- parameters ---------------------------------------------------------------------------------------------------------

CHANGES = {
    "prompt": {"prompt": "blue boat"},
    "n": {"n": 2},
    "output_format": {"output_format": "webp"},
    "stream": {"stream": True},
    "seed": {"seed": 4},
    "index": {"index": 1},
    "num_inference_steps": {"num_inference_steps": 2},
    "guidance_scale": {"guidance_scale": 9.0},
    "guidance_interval": {"guidance_interval": [0.2, 0.6]},
    "negative_prompt": {"negative_prompt": "leaves"},
    "routing": {"routing": "expert-1"},
    "solver": {"solver": "heun"},
}
"""What changes the answer, by field."""
ONE_MEANING = {
    "model": ("tiny", "other"),
    "size": ("16x16", "17x17"),
    "response_format": ("b64_json", "url"),
    "quality": ("auto", "hd"),
    "background": ("opaque", "transparent"),
    "moderation": ("low", "high"),
}
"""Fields that can only mean what is done anyhow: that value, and one that is refused."""
LABELS = {"user", "safety_identifier"}
"""Whom the client asks for: OpenAI's, of no effect on the answer."""


def test_every_parameter_of_the_schema_is_accounted_for(client):
    schema = client.get("/openapi.json").json()
    properties = schema["paths"][PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert set(properties) == set(GenerationRequest.model_fields) == {*CHANGES, *ONE_MEANING, *LABELS, "partial_images"}


ASKED = {"prompt": "red apple", "seed": 3, "num_inference_steps": 3}


@pytest.mark.parametrize("name", CHANGES)
def test_parameters_that_change_the_answer(client, name):
    plain, changed = (client.post(PATH, json={**ASKED, **more}) for more in ({}, CHANGES[name]))
    assert changed.status_code == 200, changed.text
    if name == "stream":
        assert changed.headers["content-type"].startswith("text/event-stream")
        return
    first, other = (response.json()["data"] for response in (plain, changed))
    assert [item["b64_json"] for item in first] != [item["b64_json"] for item in other]


def test_partial_images_change_a_stream(client):
    texts = [client.post(PATH, json={**ASKED, "stream": True, "partial_images": count}).text for count in (0, 1, 2)]
    assert [text.count("partial_image\n") for text in texts] == [0, 1, 2]


@pytest.mark.parametrize("name", ONE_MEANING)
def test_parameters_that_can_only_mean_what_is_done(client, name):
    taken, refused = ONE_MEANING[name]
    plain, same, other = (client.post(PATH, json={**ASKED, **more}) for more in ({}, {name: taken}, {name: refused}))
    assert same.json()["data"] == plain.json()["data"]
    assert check_refused(other)["param"] == name


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_openais_other_parameters_are_refused_by_name(client, name):
    error = check_refused(client.post(PATH, json={**ASKED, name: "x"}))
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


def test_what_is_drawn_is_a_picture(client):
    item = client.post(PATH, json=ASKED).json()["data"][0]
    assert Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))).size == (16, 16)


# -- the OpenAPI page ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def described(app):
    return schemathesis.openapi.from_asgi("/openapi.json", app)


CHECKS = (not_a_server_error, content_type_conformance, response_schema_conformance, negative_data_rejection)
POSSIBLE = {"model": "tiny", "size": "16x16", "routing": "top-1", "num_inference_steps": 1, "n": 1, "index": 7}
OPERATIONS = [("get", "/health/live"), ("get", "/health/ready"), ("get", "/v1/models"), ("get", "/v1/models/{model}"), ("get", "/v1/experts"),
              ("get", "/v1/experts/{index}/sheet"), ("post", PATH)]  # fmt: skip


def test_the_page_describes_every_operation(described):
    found = [(result.ok().method.lower(), result.ok().path) for result in described.get_all_operations()]
    assert sorted(found) == sorted(OPERATIONS)


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_nothing_that_the_page_describes_or_forbids_is_a_server_error(described, method, path, mode):
    """Requests made from the OpenAPI page, valid ones and others: no 5xx, what is wrong is refused, and errors have the one shape.

    A valid one for pictures is asked again with what this model can do, and is drawn.
    """
    operation, tried = described[path][method], Counter()

    @settings(max_examples=150 if method == "post" else 20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        response = case.call()
        tried[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        if method == "post" and mode is GenerationMode.POSITIVE:
            for name, value in POSSIBLE.items():
                case.body[name] = value if case.body.get(name) is not None else None
            # 5.0 is an integer to JSON Schema, and to this server it is not.
            case.body.update({name: int(value) for name, value in case.body.items() if name in ("seed", "partial_images") and value is not None})
            case.body["partial_images"] = case.body.get("partial_images") if case.body.get("stream") else None
            drawn = case.call()
            if drawn.status_code != 200:  # of no rule of the page, but of this server
                assert drawn.json()["error"]["param"] in ("guidance_interval", "prompt", "negative_prompt"), drawn.text
            tried[drawn.status_code] += 1
            case.validate_response(drawn, checks=CHECKS[:3])

    try:
        ask()
    except Unsatisfiable:
        pytest.skip("it takes nothing that could be wrong")
    if method == "post":
        assert tried[200 if mode is GenerationMode.POSITIVE else 400] > 50
