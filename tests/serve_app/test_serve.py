"""The application under a real Ray Serve: experts together and apart, the official client, a process killed under load."""

import os
import re
import time

import httpx
import numpy as np
import openai
import psutil
import pytest
from running import free_port, pixels, processes, wait

from paris_ray.placement import serve_groups
from serve_app import client, metrics
from serve_app.app import Args, build
from serve_app.limits import Limits, divided

KEY = "a-key-for-tests"


@pytest.fixture(scope="module")
def urls(ray_local, model_path):
    """Two applications side by side, one of each placement."""
    from ray import serve

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    common = {"model": str(model_path), "cpus": 0.1, "sampler_cpus": 0.1}
    os.environ["PARIS_API_KEYS"] = KEY
    try:
        serve.run(build(Args(**common)), name="together", route_prefix="/together")
    finally:
        del os.environ["PARIS_API_KEYS"]
    serve.run(build(Args(**common, placement="apart")), name="apart", route_prefix="/apart")
    yield {name: f"http://127.0.0.1:{port}/{name}" for name in ("together", "apart")}
    serve.shutdown()


def test_placement_does_not_change_a_byte(urls, sampler):
    from paris_ray.inference.engine import ImageRequest, generate

    for routing in ("top-2", "full", "caption"):
        request = {"prompt": "red apple", "n": 3, "seed": 0, "routing": routing, "guidance_scale": 3.0}
        together, apart = client.generate(urls["together"], key=KEY, **request), client.generate(urls["apart"], **request)
        assert together["data"] == apart["data"]
        assert together["degraded"] == apart["degraded"] == []
        expected = generate(sampler.model, [ImageRequest("red apple", seed=0, index=i, routing=routing, guidance_scale=3.0) for i in range(3)])
        for item, result in zip(together["data"], expected, strict=True):
            np.testing.assert_array_equal(pixels(item), result.image)


def test_the_official_client(urls):
    official = openai.OpenAI(base_url=urls["together"] + "/v1", api_key=KEY, max_retries=0)
    (model,) = official.models.list().data
    assert model.id == "tiny"
    assert official.models.retrieve("tiny").object == "model"
    extra = {"seed": 0, "num_inference_steps": 3, "guidance_scale": 2.0, "routing": "top-1"}
    answer = official.images.generate(
        prompt="a cat", model="tiny", n=2, size="16x16", response_format="b64_json", quality="auto", user="me", extra_body=extra
    )
    assert len(answer.data) == 2
    assert answer.output_format == "png"
    assert answer.size == "16x16"
    assert answer.model_extra["seed"] == 0
    assert answer.data[1].model_extra["index"] == 1
    ours = client.generate(urls["apart"], prompt="a cat", n=2, **extra)
    assert [item.b64_json for item in answer.data] == [item["b64_json"] for item in ours["data"]]

    for arguments, kind, param in [
        ({"n": 11}, openai.BadRequestError, "n"),
        ({"size": "1024x1024"}, openai.BadRequestError, "size"),
        ({"style": "vivid"}, openai.BadRequestError, "style"),
        ({"partial_images": 2}, openai.BadRequestError, "partial_images"),
        ({"model": "dall-e-3"}, openai.NotFoundError, "model"),
    ]:
        with pytest.raises(kind) as caught:
            official.images.generate(**{"prompt": "a cat", **arguments})
        assert caught.value.param == param
        assert caught.value.code
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=urls["together"] + "/v1", api_key="wrong-key", max_retries=0).models.list()


@pytest.mark.parametrize("name", ["together", "apart"])
def test_the_official_client_streams(urls, name):
    official = openai.OpenAI(base_url=urls[name] + "/v1", api_key=KEY, max_retries=0)
    extra = {"seed": 0, "num_inference_steps": 8, "routing": "top-1"}
    with official.images.generate(prompt="a cat", stream=True, partial_images=3, extra_body=extra) as stream:
        *previews, done = list(stream)
    assert [(event.type, event.partial_image_index) for event in previews] == [("image_generation.partial_image", i) for i in range(3)]
    assert done.type == "image_generation.completed"
    assert (done.size, done.output_format) == ("16x16", "png")
    assert done.b64_json == official.images.generate(prompt="a cat", extra_body=extra).data[0].b64_json
    assert len({event.b64_json for event in [*previews, done]}) == 4
    with pytest.raises(openai.BadRequestError, match="not one of"):
        official.images.generate(prompt="x", stream=True, extra_body={"routing": "no such"})


def test_a_client_that_leaves_a_stream_frees_the_sampler(urls):
    official = openai.OpenAI(base_url=urls["apart"] + "/v1", api_key=KEY, max_retries=0)
    slow = {"prompt": "x", "n": 5, "extra_body": {"num_inference_steps": 200, "seed": 1}}
    began = time.monotonic()
    official.images.generate(**slow)
    whole = time.monotonic() - began
    began = time.monotonic()
    with official.images.generate(**slow, stream=True, partial_images=3) as stream:
        assert next(iter(stream)).type == "image_generation.partial_image"
    client.generate(urls["apart"], prompt="y", num_inference_steps=1)
    assert time.monotonic() - began < 0.8 * whole


def test_the_http_process_has_no_torch_and_experts_no_text_tower(urls):
    def mapped(application, deployment):
        return [p.path for process in processes(application, deployment) for p in process.memory_maps()]

    for application in urls:
        assert processes(application, "Api")
        assert not [path for path in mapped(application, "Api") if "libtorch" in path]
        assert [path for path in mapped(application, "Sampler") if "libtorch" in path]
    assert len(processes("apart", "ExpertGroup-")) == 3
    assert not processes("together", "ExpertGroup-")


def test_every_answer_has_one_request_id(urls):
    for given in ("my-id", None):
        response = httpx.get(f"{urls['apart']}/health/live", headers={"x-request-id": given} if given else {})
        (found,) = response.headers.get_list("x-request-id")
        assert found == given or len(found) >= 32


def test_prometheus_sees_what_was_measured(urls):
    import ray

    port = ray.nodes()[0]["MetricsExportPort"]
    client.generate(urls["together"], key=KEY, prompt="x")
    rare = {metrics.BROKEN_STREAMS}
    wanted = {f"ray_{metric.name}{'_count' if metric.kind == 'histogram' else ''}" for metric in metrics.ALL if metric not in rare}
    wait(lambda: wanted <= set(re.findall(r"^(\w+)", httpx.get(f"http://127.0.0.1:{port}/metrics").text, re.MULTILINE)), 60)


def test_it_listens_on_loopback_only(urls):
    port = int(urls["apart"].split(":")[2].split("/")[0])
    listening = [
        c.laddr.ip
        for p in psutil.Process().children(recursive=True)
        for c in p.net_connections("tcp")
        if c.status == "LISTEN" and c.laddr.port == port
    ]
    assert set(listening) == {"127.0.0.1"}


def test_the_commands_client(urls, tmp_path, capsys, monkeypatch):
    out = tmp_path / "picture.webp"
    assert client.main(["a cat", "--url", urls["apart"], "--seed", "3", "--n", "2", "--routing", "expert-1", "--out", str(out)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture-0.webp", "picture-1.webp"]
    assert "seed 3, picture 1; expert 1 100%" in capsys.readouterr().out
    assert client.main(["a cat", "--url", urls["together"], "--out", str(out)]) == 1
    assert "PARIS_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("PARIS_API_KEY", KEY)
    assert client.main(["a cat", "--url", urls["together"], "--out", str(out)]) == 0
    assert client.main(["a cat", "--url", "http://127.0.0.1:9", "--out", str(out)]) == 1
    assert "Is the server running" in capsys.readouterr().err


def test_a_client_that_leaves_frees_the_sampler(urls):
    slow = {"prompt": "x", "n": 5, "num_inference_steps": 200, "seed": 1}
    began = time.monotonic()
    client.generate(urls["apart"], **slow)
    whole = time.monotonic() - began
    began = time.monotonic()
    with pytest.raises(client.ServerError, match="did not answer"):
        client.generate(urls["apart"], timeout=0.2 * whole, **slow)
    client.generate(urls["apart"], prompt="y", num_inference_steps=1)
    assert time.monotonic() - began < 0.7 * whole


# -- building, without a cluster ----------------------------------------------------------------------------------------


def test_arguments_are_checked(model_path, tmp_path):
    for wrong in ({"modle": "x"}, {"model": "x", "threads": 0}, {"model": "x", "placement": "sideways"}, {"model": "x", "placement": "[[0,"}, {}):
        with pytest.raises(ValueError, match=r"modle|threads|placement|model"):
            Args.model_validate(wrong)
    with pytest.raises(FileNotFoundError, match=r"jobs\.assemble"):
        build(Args(model=str(tmp_path)))
    for wrong in ([[0, 1], [1]], [[0, 3]]):
        with pytest.raises(ValueError, match="none twice"):
            build(Args(model=str(model_path), placement=wrong))
    for wrong in ([[0], []], [{"experts": [0], "replicas": [3, 1]}], [{"experts": [0], "replica": 2}]):
        with pytest.raises(ValueError, match="placement"):
            Args(model="m", placement=wrong)


def test_serve_makes_the_arguments_from_the_command_line(model_path):
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as as_serve_run_does

    as_serve_run_does(build, {"model": str(model_path), "placement": "[[0, 2], [1]]", "max_rows": "8"})
    with pytest.raises(ValueError, match="modle"):
        as_serve_run_does(build, {"model": str(model_path), "modle": "x"})


def test_arguments_from_the_command_line_are_text():
    args = Args.model_validate({"model": "m", "placement": "[[0, 2], [1]]", "gpus": "0.5", "max_rows": "8"})
    assert (args.placement, args.gpus, args.max_rows) == (((0, 2), (1,)), 0.5, 8)
    assert [group.experts for group in serve_groups(args.placement, 3)] == [(0, 2), (1,)]
    assert serve_groups("together", 3) == []
    assert [group.experts for group in serve_groups("apart", 3)] == [(0,), (1,), (2,)]


def test_groups_ask_for_what_they_need(model_path):
    """What Serve is told of each deployment, read from what it would deploy."""
    placement = [[0], {"experts": [1], "replicas": [1, 4], "gpus": 0.5, "labels": {"market": "spot"}}, {"experts": [2], "replicas": 2, "cpus": 3}]
    from ray.serve._private.build_app import build_app

    args = Args(model=str(model_path), placement=placement, cpus=0.5, samplers=2, ingresses=3)
    told = {deployment.name: deployment for deployment in build_app(build(args), name="x").deployments}
    options = {name: deployment.ray_actor_options for name, deployment in told.items()}
    assert (options["ExpertGroup-0"]["num_cpus"], options["ExpertGroup-2"]["num_cpus"], options["ExpertGroup-1"]["num_gpus"]) == (0.5, 3, 0.5)
    assert options["ExpertGroup-1"]["label_selector"] == {"market": "spot"}
    scale = told["ExpertGroup-1"]._deployment_config.autoscaling_config
    assert (scale.min_replicas, scale.max_replicas) == (1, 4)
    # Serve says nothing of a user_config that is taken away, unless there is another one below it.
    assert [told[name]._deployment_config.user_config for name in ("ExpertGroup-0", "Sampler", "Api")] == [{}, {}, None]
    assert [told[name].num_replicas for name in ("ExpertGroup-0", "ExpertGroup-2", "Sampler", "Api")] == [1, 2, 2, 3]


def test_what_a_key_may_have_is_divided_among_ingresses(model_path):
    whole = Limits(images_per_minute=50, requests_at_once=4)
    assert divided(whole, 1) == whole
    part = divided(whole, 3)
    assert (part.images_per_minute, part.requests_at_once) == (17, 2)
    assert divided(Limits(), 3) == Limits()
    with pytest.raises(ValueError, match="images_per_minute 9 is less than max_images_per_request 10"):
        build(Args(model=str(model_path), images_per_minute=18, ingresses=2))
