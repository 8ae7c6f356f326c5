import json
import pickle
import subprocess
import sys

import pytest

from serve_app.cards import ExpertCard, ModelCard
from serve_app.keys import key_digests
from serve_app.limits import Limits
from serve_app.protocol import ApiError, GenerationRequest, parse_request, resolve

CARD = ModelCard(
    id="demo",
    created=1,
    fingerprint="f",
    image_size=32,
    experts=[ExpertCard(index=k, objective="flow", cluster_size=3, fingerprint=None, state="ready") for k in range(3)],
    sampling={"steps": 25, "guidance_scale": 3.0, "routing": "top-2", "solver": "euler"},
    router_reads_text=True,
    attribution=None,
    warm=True,
)


def parse(**fields):
    return parse_request(json.dumps(fields).encode())


def refused(body: bytes | dict) -> ApiError:
    with pytest.raises(ApiError) as caught:
        resolve(parse_request(body if isinstance(body, bytes) else json.dumps(body).encode()), CARD, Limits())
    error = caught.value
    assert 400 <= error.status < 500
    assert len(error.message) < 600
    return error


def test_the_openai_sdk_knows_no_field_that_we_do_not():
    """Each field of the official client is either accepted or refused by name with a remedy; none is an unknown field."""
    from openai.types.image_generate_params import ImageGenerateParamsStreaming

    from serve_app.protocol import UNSUPPORTED

    theirs = set(ImageGenerateParamsStreaming.__annotations__) | {"stream"}
    for base in ImageGenerateParamsStreaming.__orig_bases__:
        theirs |= set(getattr(base, "__annotations__", {}))
    assert len(theirs) > 15
    assert theirs <= set(GenerationRequest.model_fields) | set(UNSUPPORTED)


def test_defaults_come_from_the_model():
    job = resolve(parse(prompt="a cat"), CARD, Limits())
    assert (job.n, job.steps, job.guidance_scale, job.routing, job.solver, job.index, job.negative_prompt) == (1, 25, 3.0, "top-2", "euler", 0, "")
    assert 0 <= job.seed < 2**48


def test_every_solver_can_be_asked_for_and_counts_its_evaluations():
    from paris_ray.diffusion.solvers import SOLVERS

    for solver in SOLVERS:
        assert resolve(parse(prompt="x", solver=solver), CARD, Limits()).solver == solver
    # One evaluation a step: a thousand are as many as a request may ask for.
    assert resolve(parse(prompt="x", n=10, num_inference_steps=100, solver="dpmpp_2m"), CARD, Limits()).n == 10


def test_a_drawn_seed_is_another_each_time_and_seed_zero_stays_zero():
    assert len({resolve(parse(prompt="x"), CARD, Limits()).seed for _ in range(20)}) == 20
    assert resolve(parse(prompt="x", seed=0), CARD, Limits()).seed == 0


def test_guidance_interval():
    assert resolve(parse(prompt="x"), CARD, Limits()).guidance_interval == (0.0, 1.0)
    assert resolve(parse(prompt="x", guidance_interval=[0, 0.8]), CARD, Limits()).guidance_interval == (0.0, 0.8)


def test_null_is_not_given():
    everything = dict.fromkeys(GenerationRequest.model_fields) | {"prompt": "x", "seed": 1, "style": None}
    assert resolve(parse_request(json.dumps(everything).encode()), CARD, Limits()) == resolve(parse(prompt="x", seed=1), CARD, Limits())


def test_fields_without_effect_are_accepted():
    parse(prompt="x", user="u", safety_identifier="s", quality="auto", background="opaque", moderation="low", partial_images=0, stream=False,
          response_format="b64_json", size="32x32", model="demo")  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({}, "prompt", "required"),
        ({"prompt": ""}, "prompt", "at least 1"),
        ({"prompt": 3}, "prompt", "string"),
        ({"prompt": "x", "n": 0}, "n", "greater than or equal to 1"),
        ({"prompt": "x", "n": 11}, "n", "limit of 10"),
        ({"prompt": "x", "n": True}, "n", "integer"),
        ({"prompt": "x", "n": 2.0}, "n", "integer"),
        ({"prompt": "x", "n": "2"}, "n", "integer"),
        ({"prompt": "x", "size": "100000x10000"}, "size", "32x32"),
        ({"prompt": "x", "size": "A" * 5000}, "size", "32x32"),
        ({"prompt": "x", "model": "dall-e-3"}, "model", "'demo'"),
        ({"prompt": "x", "response_format": "url"}, "response_format", "b64_json"),
        ({"prompt": "x", "output_format": "gif"}, "output_format", "png"),
        ({"prompt": "x", "seed": -1}, "seed", "greater"),
        ({"prompt": "x", "seed": 2**63}, "seed", "less"),
        ({"prompt": "x", "seed": 1.5}, "seed", "integer"),
        ({"prompt": "x", "seed": False}, "seed", "integer"),
        ({"prompt": "x", "index": 2**31 - 1, "n": 2}, "index", "limit"),
        ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps", "greater"),
        ({"prompt": "x", "num_inference_steps": 10**400}, "num_inference_steps", "limit of 200"),
        ({"prompt": "x", "num_inference_steps": 200, "n": 10}, "num_inference_steps", "2000 evaluations"),
        ({"prompt": "x", "num_inference_steps": 60, "n": 10, "solver": "heun"}, "num_inference_steps", "1190 evaluations"),
        ({"prompt": "x", "num_inference_steps": 60, "n": 10, "solver": "midpoint"}, "num_inference_steps", "1200 evaluations"),
        ({"prompt": "x", "guidance_scale": 0.5}, "guidance_scale", "greater"),
        ({"prompt": "x", "guidance_scale": True}, "guidance_scale", "number"),
        ({"prompt": "x", "guidance_interval": [0.8, 0.2]}, "guidance_interval", "0 <= low < high <= 1"),
        ({"prompt": "x", "guidance_interval": [0.2]}, "guidance_interval", "two times"),
        ({"prompt": "x", "guidance_interval": [0.2, 0.4, 0.6]}, "guidance_interval", "two times"),
        ({"prompt": "x", "guidance_interval": [0.2, 1.5]}, "guidance_interval", "two times"),
        ({"prompt": "x", "guidance_interval": [0.2, True]}, "guidance_interval", "two times"),
        ({"prompt": "x", "guidance_interval": 0.5}, "guidance_interval", "two times"),
        ({"prompt": "x", "routing": "top-4"}, "routing", "top-3"),
        ({"prompt": "x", "routing": "expert-3"}, "routing", "expert-2"),
        ({"prompt": "x", "routing": "top-२"}, "routing", "not one of"),
        ({"prompt": "x", "solver": "rk45"}, "solver", "euler"),
        ({"prompt": "x" * 4001}, "prompt", "4001 characters"),
        ({"prompt": "x", "negative_prompt": "x" * 4001}, "negative_prompt", "4001 characters"),
        ({"prompt": "x", "stream": "yes"}, "stream", "boolean"),
        ({"prompt": "x", "partial_images": 2}, "partial_images", "'stream': true"),
        ({"prompt": "x", "stream": True, "partial_images": 4}, "partial_images", "from 0 to 3"),
        ({"prompt": "x", "quality": "hd"}, "quality", "num_inference_steps"),
        ({"prompt": "x", "background": "transparent"}, "background", "opaque"),
        ({"prompt": "x", "style": "vivid"}, "style", "prompt"),
        ({"prompt": "x", "gudance_scale": 3}, "gudance_scale", "'guidance_scale'"),
        ({"prompt": "x", "cfg_scale": 3}, "cfg_scale", "unknown field"),
        ({"prompt": "x", "k" * 9000: 1}, "k" * 80, "unknown field"),
    ],
)
def test_refusals_name_field_and_rule(fields, param, words):
    error = refused(fields)
    assert error.param == param
    assert words in error.message
    assert error.status == (404 if param == "model" else 400)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b'{"prompt": "x", "guidance_scale": NaN}', b'{"prompt": "x", "guidance_scale": Infinity}',
     b'{"prompt": "x", "guidance_scale": -Infinity}', b'{"prompt": "\\ud800"}', b'{"prompt": "x"} trailing', b"[" * 60_000, b'{"a":' * 10_000,
     b'{"seed": ' + b"9" * 60_000 + b"}"],
)  # fmt: skip
def test_what_is_not_json(body):
    assert refused(body).code == "invalid_json"


def test_a_number_too_large_for_a_float_is_refused():
    assert refused(b'{"prompt": "x", "guidance_scale": 1e999}').param in ("guidance_scale", None)


def test_errors_survive_a_process_boundary():
    error = ApiError(429, "busy", "rate_limit_error", code="queue_full", retry_after=3)
    again = pickle.loads(pickle.dumps(error))
    assert vars(again) == vars(error)
    assert again.body() == {"error": {"message": "busy", "type": "rate_limit_error", "param": None, "code": "queue_full"}}


def test_keys():
    assert len(key_digests("abcdefgh # mine\n\nijklmnop,qrstuvwx\n")) == 3
    for text in ("", "# nothing\n", "short", "with a blank in it", "schlüssel-mit-ü"):
        with pytest.raises(ValueError, match="API keys"):
            key_digests(text)


def test_the_http_process_imports_no_torch():
    code = "import sys, serve_app.api, serve_app.app, serve_app.client; print([m for m in ('torch', 'transformers', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
