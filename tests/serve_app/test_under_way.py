"""What happens to an application while it serves: deaths, departures, new weights, other placements. In short; the long form is tests/chaos."""

import concurrent.futures
import json
import shutil
import threading
import time

import httpx
import numpy as np
import pytest
from running import PATH, Application, Load, free_port, pixels, wait
from test_keeper import exchange, published_name

from paris_ray.inference.engine import ImageRequest, generate
from paris_ray.inference.weights import load_model

FIELDS = {"routing": "full", "num_inference_steps": 20}


@pytest.fixture(scope="module")
def folder(model_path, tmp_path_factory):
    copy = tmp_path_factory.mktemp("under_way") / "model"
    shutil.copytree(model_path, copy)
    return copy


@pytest.fixture(scope="module")
def application(ray_local, folder):
    """Two groups of experts, two ingresses."""
    from ray import serve

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    application = Application(port, model=str(folder), placement=[[0, 2], [1]], cpus=0.1, sampler_cpus=0.1, ingresses=2, max_rows=8, max_queue=56)
    application.deploy()
    wait(application.ready)
    wait(lambda: len(application.processes("Api")) == 2)
    yield application
    serve.shutdown()


@pytest.fixture(autouse=True)
def nothing_is_left(application):
    """After each test the engine has nothing to do, and all experts are there."""
    yield
    wait(application.ready)
    wait(application.idle, 30)
    wait(lambda: application.states() == ["ready"] * 3)


def expected(folder, seeds, **fields):
    fields = {**FIELDS, **fields}
    requests = [ImageRequest("red apple", seed=seed, steps=fields["num_inference_steps"], routing=fields["routing"]) for seed in seeds]
    return {request.seed: result.image for request, result in zip(requests, generate(load_model(folder), requests), strict=True)}


# -- the same bytes -----------------------------------------------------------------------------------------------------


def test_alone_and_amid_thirty_others_over_two_groups(application, folder):
    """The experts' placement is another than that of the engine in this process, which draws them one by one."""
    model = load_model(folder)
    asked = [{"seed": 7, "routing": routing, "num_inference_steps": 5} for routing in ("top-2", "full", "caption")]
    alone = [generate(model, [ImageRequest("red apple", seed=7, steps=5, routing=one["routing"])])[0].image for one in asked]
    for one, image in zip(asked, alone, strict=True):
        np.testing.assert_array_equal(pixels(application.ask(**one).json()["data"][0]), image)
    with concurrent.futures.ThreadPoolExecutor(33) as pool:
        others = [pool.submit(application.ask, prompt=f"thing {i % 5}", seed=i, num_inference_steps=3 + i % 6, n=1 + i % 2) for i in range(30)]
        for one, image in zip([pool.submit(application.ask, **one) for one in asked], alone, strict=True):
            np.testing.assert_array_equal(pixels(one.result().json()["data"][0]), image)
        assert {one.result().status_code for one in others} == {200}


# -- deaths -------------------------------------------------------------------------------------------------------------


def test_a_sampler_killed_under_load_costs_no_answer(application, folder):
    (victim,) = application.processes("Sampler")
    with Load(application, **FIELDS) as load:
        killed = time.monotonic()
        victim.kill()
        wait(lambda: load.first_answer_after(killed) is not None, 60)
        wait(lambda: len(load.answers) > 12)
    assert load.failures == []
    assert load.same_bytes(expected(folder, range(4))) > 8


def test_a_stream_goes_on_over_the_death_of_its_sampler(application, folder):
    (victim,) = application.processes("Sampler")
    asked = {"prompt": "red apple", "seed": 3, "num_inference_steps": 200, "routing": "full", "stream": True, "partial_images": 3}
    events, killed = [], False
    with httpx.stream("POST", application.url + PATH, json=asked, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line[6:]))
                if not killed:
                    victim.kill()
                    killed = True
    assert [event["type"].rpartition(".")[2] for event in events] == ["partial_image"] * 3 + ["completed"]
    assert [event["partial_image_index"] for event in events[:-1]] == [0, 1, 2]
    if not events[-1]["degraded"]:
        np.testing.assert_array_equal(pixels(events[-1]), expected(folder, [3], num_inference_steps=200)[3])


def test_an_ingress_killed_under_load_takes_its_own_connections_and_no_others(application, folder):
    victims = application.processes("Api")
    with Load(application, clients=6, **FIELDS) as load:
        killed = time.monotonic()
        victims[0].kill()
        wait(lambda: load.first_answer_after(killed) is not None, 60)
        wait(lambda: len(application.processes("Api")) == 2)
        wait(lambda: len(load.answers) > 18)
    # A connection to the dead one is reset, or its proxy says 500; each client had one at most.
    assert len(load.failures) <= 6, load.failures
    assert load.same_bytes(expected(folder, range(6))) > 8


def test_a_group_of_experts_killed_under_load_is_named_until_it_is_back(application, folder):
    (victim,) = application.processes("ExpertGroup-1")
    with Load(application, **FIELDS) as load:
        killed = time.monotonic()
        victim.kill()
        wait(lambda: load.first_answer_after(killed) is not None, 60)
        wait(lambda: application.states() == ["ready"] * 3)
        before = len(load.answers)
        wait(lambda: len(load.answers) > before + 4 and not load.answers[-1]["degraded"])
    assert load.failures == []
    assert {tuple(body["degraded"]) for body in load.answers} <= {(), (1,)}
    assert load.same_bytes(expected(folder, range(4))) > 4


def test_a_group_that_hangs_is_left_out_and_named(application, folder):
    (victim,) = application.processes("ExpertGroup-1")
    with Load(application, **FIELDS) as load:
        victim.suspend()
        try:
            wait(lambda: load.answers[-1]["degraded"] == [1], 40)
            assert application.states()[1] == "dead"
            assert "does not answer" in application.get("/v1/experts")["data"][1]["reason"]
            refused = application.ask(routing="expert-1")
            assert refused.status_code == 503
            assert (refused.json()["error"]["code"], refused.json()["error"]["param"]) == ("expert_unavailable", "routing")
        finally:
            victim.resume()
        wait(lambda: not load.answers[-1]["degraded"], 60)
    assert load.failures == []
    assert load.same_bytes(expected(folder, range(4))) > 0


def test_half_of_the_clients_leave(application, folder):
    """Their pictures are cancelled, the others' are as ever."""
    gone, left = {"num_inference_steps": 200, "n": 3, "routing": "full"}, {"num_inference_steps": 30, "routing": "full"}

    def leave(seed):
        with pytest.raises(httpx.TimeoutException):
            application.ask(timeout=0.5, seed=seed, **gone)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        leaving = [pool.submit(leave, seed) for seed in range(6)]
        staying = [pool.submit(application.ask, seed=seed, **left) for seed in range(6)]
        answers = [one.result() for one in staying]
        [one.result() for one in leaving]
    images = expected(folder, range(6), num_inference_steps=30)
    for seed, answer in enumerate(answers):
        np.testing.assert_array_equal(pixels(answer.json()["data"][0]), images[seed])
    wait(application.idle, 10)


def test_four_times_too_much_is_answered_or_refused_and_nothing_else(application):
    with concurrent.futures.ThreadPoolExecutor(26) as pool:  # 260 pictures, where 64 find a place
        asked = [pool.submit(application.ask, seed=seed, n=10, num_inference_steps=10) for seed in range(52)]
        answers = [one.result() for one in asked]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(int(answer.headers["retry-after"]) > 0 for answer in answers if answer.status_code == 429)


# -- new weights --------------------------------------------------------------------------------------------------------


def test_weights_are_exchanged_while_it_serves_and_no_process_is(application, folder):
    before = expected(folder, range(4))
    pids = {name: {p.pid for p in application.processes(name)} for name in ("Api", "Sampler", "ExpertGroup-0", "ExpertGroup-1")}
    with Load(application, **FIELDS) as load:
        assert load.same_bytes(before)
        exchange(folder, 2, scale=0.9)
        application.deploy(ExpertGroup_0={"revision": "2"})
        name = published_name(folder, 2)
        wait(lambda: application.get("/v1/experts")["data"][2]["fingerprint"] == name, 60)
        known = len(load.answers)
        wait(lambda: len(load.answers) > known + 8)
    after = expected(folder, range(4))
    assert load.failures == []
    for body in load.answers:
        assert body["degraded"] == []
        image = pixels(body["data"][0])
        if not body["data"][0]["changed"]:
            assert np.array_equal(image, before[body["seed"]]) or np.array_equal(image, after[body["seed"]])
    for body in load.answers[known + 4 :]:
        np.testing.assert_array_equal(pixels(body["data"][0]), after[body["seed"]])
    assert {name: {p.pid for p in application.processes(name)} for name in pids} == pids


def test_an_expert_is_retired_while_it_serves_and_comes_back(application, folder):
    with Load(application, **FIELDS) as load:
        application.deploy(ExpertGroup_0={"retired": [0]})
        wait(lambda: load.answers[-1]["degraded"] == [0], 60)
        wait(lambda: application.states() == ["missing", "ready", "ready"])
        application.deploy()  # the entry is taken away
        wait(lambda: not load.answers[-1]["degraded"], 60)
    assert load.failures == []
    assert {tuple(body["degraded"]) for body in load.answers} == {(), (0,)}
    assert load.same_bytes(expected(folder, range(4))) > 4


# -- its end ------------------------------------------------------------------------------------------------------------


def test_what_has_begun_is_finished_when_the_application_goes(ray_local, application, folder):
    """All experts with the sampler: one process that finishes what it has."""
    from ray import serve

    from serve_app.app import Args, build

    serve.run(build(Args(model=str(folder), cpus=0.1)), name="going", route_prefix="/going")
    going = Application(application.port, "going")
    answers = []
    asking = threading.Thread(target=lambda: answers.append(going.ask(seed=1, n=5, num_inference_steps=200, routing="full")))
    asking.start()
    wait(lambda: not going.idle())
    serve.delete("going", _blocking=False)
    asking.join(60)
    assert [answer.status_code for answer in answers] == [200]
    np.testing.assert_array_equal(pixels(answers[0].json()["data"][0]), expected(folder, [1], num_inference_steps=200)[1])
