"""How little may be left of a model before it is not served: with expert 1 missing."""

import shutil

import numpy as np
import pytest
from starlette.testclient import TestClient

from serve_app.api import create_app
from serve_app.app import Args, build
from serve_app.deployments import Sampler

PATH = "/v1/images/generations"
ASKED = {"prompt": "red apple", "seed": 5, "num_inference_steps": 1, "routing": "full"}


@pytest.fixture(scope="module")
def without_one(model_path, tmp_path_factory):
    copy = tmp_path_factory.mktemp("floors") / "model"
    shutil.copytree(model_path, copy)
    shutil.rmtree(copy / "expert_1")
    return copy


@pytest.fixture(scope="module")
def lost(sampler):
    """What the router gives expert 1 at the only step, when all are there."""
    body = TestClient(create_app(sampler)).post(PATH, json=ASKED).json()
    assert body["data"][0]["masked_probability"] == 0.0
    return body["data"][0]["routing"][0]["weights"][1]


def answer(model, **floors):
    sampler = Sampler(str(model), **floors)
    try:
        client = TestClient(create_app(sampler), raise_server_exceptions=False)
        return client.post(PATH, json=ASKED), client.post(PATH, json={**ASKED, "stream": True}), client.get("/health/ready")
    finally:
        sampler.close()


@pytest.mark.parametrize(("floor", "served"), [(1, True), (2, True), (3, False)])
def test_fewer_experts_than_there_must_be(without_one, floor, served):
    whole, stream, ready = answer(without_one, min_experts=floor)
    assert [response.status_code == 200 for response in (whole, stream, ready)] == [served] * 3
    if not served:
        for response in (whole, stream):
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["type"]) == (503, "too_degraded", "server_error")
            assert error["message"].startswith("Experts 1 are not available; 2 are")
            assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize("served", [True, False])
def test_more_probability_lost_than_may_be(without_one, lost, served):
    assert 0.01 < lost < 0.99
    whole, stream, ready = answer(without_one, max_masked_probability=lost + (1e-3 if served else -1e-3))
    assert ready.status_code == 200  # other pictures may lose less
    if served:
        assert whole.json()["data"][0]["masked_probability"] == pytest.approx(lost, abs=1e-4)
        assert whole.json()["degraded"] == [1]
        assert np.isclose(sum(whole.json()["data"][0]["routing"][0]["weights"]), 1)
    else:
        error = whole.json()["error"]
        assert (whole.status_code, error["code"]) == (503, "too_degraded")
        assert "experts 1 are not available" in error["message"]
        assert f"{lost:.1%}" in error["message"]
        assert '"code": "too_degraded"' in stream.text


def test_a_floor_that_no_model_could_meet_is_refused(model_path):
    with pytest.raises(ValueError, match="min_experts: 4 are more than the model's 3"):
        build(Args(model=str(model_path), min_experts=4))
    with pytest.raises(ValueError, match="max_masked_probability"):
        Args(model="m", max_masked_probability=1.5)
