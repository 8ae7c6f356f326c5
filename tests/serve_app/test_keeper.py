"""Experts that come, are exchanged and go, in one process and without Ray; the pictures against engines over fresh copies of the files."""

import json
import re
import shutil
import time

import numpy as np
import pytest
import torch
from running import wait
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

from paris_ray.inference.engine import Engine, ImageRequest, generate
from paris_ray.inference.experts import ExpertError
from paris_ray.inference.weights import ExpertFiles, load_model
from paris_ray.layout import EXPERT_FILE
from paris_ray.manifest import fingerprint
from paris_ray.storage import Folder
from serve_app import keeper as keeper_module
from serve_app.api import create_app
from serve_app.deployments import Sampler
from serve_app.keeper import RETIRED, Keeper

PATH = "/v1/images/generations"
ASKED = {"prompt": "red apple", "seed": 5, "num_inference_steps": 3, "routing": "full"}


@pytest.fixture
def folder(model_path, tmp_path):
    """A model whose files a test may change."""
    copy = tmp_path / "model"
    shutil.copytree(model_path, copy)
    return copy


def exchange(folder, k, scale=0.5, in_place=False):
    """Other weights for an expert, under the same name; written over the old file, or put in its place."""
    file = folder / f"expert_{k}" / EXPERT_FILE
    tensors = {name: value * scale for name, value in load_file(file).items()}
    save_file(tensors, file.with_suffix(".new"))
    if in_place:
        file.write_bytes(file.with_suffix(".new").read_bytes())
        file.with_suffix(".new").unlink()
    else:
        file.with_suffix(".new").rename(file)


def published_name(folder, k):
    files = Folder(folder / f"expert_{k}")
    return fingerprint({name: files.sha256(name) for name in ("config.json", EXPERT_FILE)})


def picture(folder, request):
    return generate(load_model(folder), [request])[0].image


REQUEST = ImageRequest("red apple", seed=5, steps=3, routing="full")


def draw(keeper, model):
    engine = Engine(model, keeper.experts)
    future = engine.submit(REQUEST)
    engine.run_until_idle()
    return future.result()


def states(keeper):
    return [state.state for state in keeper.states()]


def reconfigure(keeper, **changes):
    done = keeper.reconfigure(changes)
    if done is not None:
        done.result(60)
    return keeper.states()


def test_experts_are_named_as_assembly_names_them(folder):
    keeper = Keeper(str(folder))
    assert states(keeper) == ["ready"] * 3
    assert [state.fingerprint for state in keeper.states()] == [published_name(folder, k) for k in range(3)]
    assert [state.objective for state in keeper.states()] == ["flow", "ddpm", "flow"]


@pytest.mark.parametrize("in_place", [False, True])
def test_weights_are_exchanged_when_the_revision_says_so_and_not_before(folder, in_place):
    keeper, model = Keeper(str(folder)), load_model(folder)
    before = picture(folder, REQUEST)
    first = draw(keeper, model)  # and the experts' caches of this text are full
    np.testing.assert_array_equal(first.image, before)
    exchange(folder, 1, in_place=in_place)
    np.testing.assert_array_equal(draw(keeper, model).image, before)
    found = reconfigure(keeper, revision="2")
    after = draw(keeper, model)
    np.testing.assert_array_equal(after.image, picture(folder, REQUEST))
    assert not np.array_equal(after.image, before)
    assert found[1].fingerprint == published_name(folder, 1)
    assert after.versions == {k: [published_name(folder, k)] for k in range(3)}
    assert after.versions[0] == first.versions[0]


def test_only_what_differs_is_read_again(folder, monkeypatch):
    keeper, read = Keeper(str(folder)), []
    original = type(keeper.files).load_expert
    monkeypatch.setattr(type(keeper.files), "load_expert", lambda self, k, **more: read.append(k) or original(self, k, **more))
    exchange(folder, 2)
    reconfigure(keeper, revision="2")
    assert read == [2]


def test_a_picture_on_its_way_says_whose_weights_were_exchanged(folder):
    keeper, model = Keeper(str(folder)), load_model(folder)
    engine = Engine(model, keeper.experts)
    future, other = engine.submit(REQUEST), engine.submit(ImageRequest("x", steps=3, routing="expert-0"))
    old = published_name(folder, 1)
    engine.tick()
    exchange(folder, 1)
    reconfigure(keeper, revision="2")
    engine.run_until_idle()
    assert future.result().versions[1] == [old, published_name(folder, 1)]
    assert [len(names) for names in future.result().versions.values()] == [1, 2, 1]
    assert other.result().versions == {0: [published_name(folder, 0)]}


def test_an_expert_comes_when_its_files_do(folder, tmp_path):
    shutil.move(folder / "expert_1", tmp_path / "away")
    keeper, model = Keeper(str(folder)), load_model(folder)
    assert states(keeper) == ["ready", "missing", "ready"]
    assert "no weights in" in keeper.states()[1].reason
    assert draw(keeper, model).degraded == [1]
    shutil.move(tmp_path / "away", folder / "expert_1")
    reconfigure(keeper, revision="2")
    assert states(keeper) == ["ready"] * 3
    result = draw(keeper, model)
    assert result.degraded == []
    np.testing.assert_array_equal(result.image, picture(folder, REQUEST))


def test_an_expert_is_retired_and_comes_back(folder):
    keeper, model = Keeper(str(folder)), load_model(folder)
    whole = draw(keeper, model).image
    found = reconfigure(keeper, retired=[2])
    assert (found[2].state, found[2].reason) == ("missing", "retired by the server's user_config")
    assert draw(keeper, model).degraded == [2]
    reconfigure(keeper)
    np.testing.assert_array_equal(draw(keeper, model).image, whole)


def nothing_finite(folder):
    file = folder / "expert_1" / EXPERT_FILE
    tensors = load_file(file)
    save_file({**tensors, "pos_embed": torch.full_like(tensors["pos_embed"], torch.nan)} if "pos_embed" in tensors else
              {name: torch.full_like(value, torch.nan) for name, value in tensors.items()}, file)  # fmt: skip


def half_written(folder):
    file = folder / "expert_1" / EXPERT_FILE
    file.write_bytes(file.read_bytes()[:-1000])


def of_another_shape(folder):
    config = folder / "expert_1" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": 64}))


def without_finite_velocities(folder):
    """Finite weights, of which nothing finite comes."""
    exchange(folder, 1, scale=1e30)


def of_other_latents(folder):
    """A model of another latent size in the place of the old one."""
    info, k = json.loads((folder / "paris.json").read_text()), folder / "expert_1" / "config.json"
    (folder / "paris.json").write_text(json.dumps({**info, "latent": {**info["latent"], "size": 16}}))
    k.write_text(json.dumps({**json.loads(k.read_text()), "image_size": 16}))


def gone(folder):
    shutil.rmtree(folder / "expert_1")


@pytest.mark.parametrize("harm", [nothing_finite, half_written, of_another_shape, without_finite_velocities, gone])
def test_weights_that_cannot_be_served_are_not_taken(folder, harm):
    keeper, model = Keeper(str(folder)), load_model(folder)
    whole = draw(keeper, model).image
    harm(folder)
    found = reconfigure(keeper, revision="2")
    assert states(keeper) == ["ready"] * 3
    assert "the weights before it serve" in found[1].reason
    assert [state.reason for state in found][::2] == ["", ""]
    np.testing.assert_array_equal(draw(keeper, model).image, whole)
    if harm is not gone:  # at a start there are none before them
        assert states(Keeper(str(folder))) == ["ready", "dead" if harm is without_finite_velocities else "missing", "ready"]


def test_a_model_of_other_latents_is_not_taken_by_a_process_of_the_old_one(folder):
    keeper, model = Keeper(str(folder)), load_model(folder)
    whole = draw(keeper, model).image
    of_other_latents(folder)
    found = reconfigure(keeper, revision="2")
    assert states(keeper) == ["ready"] * 3
    assert all("(4, 16, 16)" in state.reason and "restart it" in state.reason for state in found)
    np.testing.assert_array_equal(draw(keeper, model).image, whole)


def test_weights_are_tried_before_they_serve(folder, monkeypatch):
    """Never between the exchange and the end of the try is anything served but the old ones."""
    keeper, put = Keeper(str(folder)), []
    monkeypatch.setattr(keeper.experts, "put", lambda *arguments: put.append(arguments))
    without_finite_velocities(folder)
    reconfigure(keeper, revision="2")
    assert put == []


def test_files_that_change_while_they_are_read_are_not_taken(folder, monkeypatch):
    keeper = Keeper(str(folder))
    original = ExpertFiles.load_expert

    def change(self, k, **more):
        loaded = original(self, k, **more)
        exchange(folder, k, scale=0.25)
        return loaded

    monkeypatch.setattr(ExpertFiles, "load_expert", change)
    exchange(folder, 1)
    found = reconfigure(keeper, revision="2")
    assert "changed while they were read" in found[1].reason


def test_with_the_same_revision_nothing_is_exchanged(folder):
    keeper = Keeper(str(folder))
    before = reconfigure(keeper, revision="2")[1].fingerprint
    exchange(folder, 1)
    found = reconfigure(keeper, revision="2", retired=[2])
    assert (found[1].fingerprint, found[2].state) == (before, "missing")
    found = reconfigure(keeper, revision="2")
    assert (found[1].fingerprint, found[2].state) == (before, "ready")
    assert reconfigure(keeper, revision="3")[1].fingerprint == published_name(folder, 1) != before


def test_an_expert_that_had_to_leave_memory_comes_back_as_it_was_or_not_at_all(folder):
    keeper, model = Keeper(str(folder)), load_model(folder)
    whole = draw(keeper, model).image
    keeper.experts._residents.drop(1)  # as when memory is short
    np.testing.assert_array_equal(draw(keeper, model).image, whole)
    exchange(folder, 1)
    keeper.experts._residents.drop(1)
    with pytest.raises(ExpertError, match="hold other weights by now"):
        draw(keeper, model)
    reconfigure(keeper, revision="2")
    np.testing.assert_array_equal(draw(keeper, model).image, picture(folder, REQUEST))


@pytest.mark.parametrize("serving", [False, True])
def test_storage_that_fails_for_a_while_is_asked_again(folder, monkeypatch, serving):
    down, asked, original = [not serving], [], Folder.sha256

    def sha256(self, name):
        asked.append(self.uri)
        if down[0] and self.uri.endswith("expert_1"):
            raise OSError("503, slow down")
        return original(self, name)

    monkeypatch.setattr(keeper_module, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(Folder, "sha256", sha256)
    keeper = Keeper(str(folder))
    if serving:
        down[0] = True
        exchange(folder, 1)
        reconfigure(keeper, revision="2")
    assert states(keeper) == ["ready", "ready" if serving else "missing", "ready"]
    assert re.search(r"503, slow down; it is tried again after 0\.05 s", keeper.states()[1].reason)

    def checked(count):
        for _ in range(count):
            time.sleep(0.03)
            keeper.check()

    checked(10)
    assert 1 <= asked.count(str(folder / "expert_1")) - serving <= 6  # at longer and longer intervals
    down[0] = False
    wait(lambda: checked(1) or keeper.states()[1].fingerprint == published_name(folder, 1), 20)
    assert (states(keeper), keeper.states()[1].reason) == (["ready"] * 3, "")


def test_storage_that_comes_back_does_not_bring_back_a_retired_expert(folder, monkeypatch):
    monkeypatch.setattr(keeper_module, "AGAIN_SECONDS", 0.0)
    with monkeypatch.context() as failing:
        failing.setattr(Folder, "sha256", lambda self, name: (_ for _ in ()).throw(OSError("503")))
        keeper = Keeper(str(folder), indices=(0, 1))
    reconfigure(keeper, retired=[1])
    keeper.check()
    wait(lambda: states(keeper) == ["ready", "missing"], 20)
    assert keeper.states()[1].reason == RETIRED


def test_a_user_config_that_makes_no_sense_changes_nothing_and_is_named(folder):
    keeper = Keeper(str(folder), indices=(0, 1))
    for wrong, said in [({"retired": [2]}, r"\[2\] are not here"), ({"revison": "2"}, "revison"), ({"retired": "x"}, "retired"), ([1], "")]:
        assert keeper.reconfigure(wrong) is None
        assert states(keeper) == ["ready", "ready"]
        assert all("user_config was refused" in state.reason and said.replace("\\", "") in state.reason for state in keeper.states())
    reconfigure(keeper, revision="2")
    assert [state.reason for state in keeper.states()] == ["", ""]


@pytest.fixture
def watched(folder, monkeypatch):
    """A keeper, and whom it tries."""
    keeper, tried = Keeper(str(folder)), []
    original = keeper._run
    monkeypatch.setattr(keeper, "_run", lambda experts, k: tried.append(k) or original(experts, k))
    return keeper, tried


def test_health_runs_a_forward_of_an_expert_that_nobody_asks(watched, model_path):
    keeper, tried = watched
    for _ in range(6):
        keeper.check()
    assert tried == [0, 1, 2]  # each has run once when it came
    draw(keeper, load_model(model_path))
    for _ in range(6):
        keeper.check()
    assert tried == [0, 1, 2] * 2


def spoil(keeper, k):
    module, _ = keeper.experts._residents.get(k)
    parameter = next(module.parameters()).data
    whole = parameter.clone()
    parameter.fill_(torch.nan)
    return lambda: parameter.copy_(whole)


def test_an_expert_that_fails_is_tried_until_it_passes(watched):
    """Serve replaces a process that fails three times in a row; the others would pass in between."""
    keeper, tried = watched
    for _ in range(3):
        keeper.check()
    mend = spoil(keeper, 1)
    keeper.check()
    for _ in range(3):
        with pytest.raises(ArithmeticError, match="not finite"):
            keeper.check()
    mend()
    for _ in range(3):
        keeper.check()
    assert tried == [0, 1, 1, 1, 1, 2, 0]


def test_an_answer_that_is_not_finite_is_none(watched, model_path):
    keeper, _ = watched
    engine = Engine(load_model(model_path), keeper.experts)
    spoil(keeper, 1)
    engine.submit(REQUEST)
    engine.tick()
    keeper.check()
    with pytest.raises(ArithmeticError):
        keeper.check()


# -- through the sampler and its API ------------------------------------------------------------------------------------


@pytest.fixture
def served(folder):
    sampler = Sampler(str(folder))
    yield sampler, TestClient(create_app(sampler))
    sampler.close()


def test_the_sampler_takes_user_config_and_says_so(served, folder):
    sampler, client = served
    before = client.post(PATH, json=ASKED).json()
    exchange(folder, 1)
    sampler.keeper.reconfigure({"revision": "2", "retired": [0]}).result(60)
    after = client.post(PATH, json=ASKED).json()
    assert after["degraded"] == [0]
    assert after["data"][0]["b64_json"] != before["data"][0]["b64_json"]
    experts = client.get("/v1/experts").json()["data"]
    assert [(one["index"], one["state"]) for one in experts] == [(0, "missing"), (1, "ready"), (2, "ready")]
    assert "user_config" in experts[0]["reason"]
    assert experts[1]["fingerprint"] == published_name(folder, 1)
    assert client.get("/v1/models").json()["data"][0]["experts"][1]["fingerprint"] == published_name(folder, 1)
    # Of the warm-up, and of each request's three steps.
    assert experts[2]["rows"] > 6
    # Of several samplers each counts for itself: whose load it is, is said, and the model is one.
    second = Sampler(str(folder))
    loads = [one.get("/v1/experts").json()["load"] for one in (client, client, TestClient(create_app(second)))]
    second.close()
    assert loads[0] == loads[1] == {"sampler": sampler.name, "queued": 0, "active": 0}
    assert loads[2]["sampler"] != sampler.name
    assert "sampler" not in client.get("/v1/models").json()["data"][0]
    sampler.check_health()


def test_an_answer_says_that_weights_were_exchanged_meanwhile(served, folder):
    sampler, client = served
    old, seen = published_name(folder, 1), []

    def change(*arguments, **more):
        seen.append(arguments)
        if len(seen) == 4:  # of ten steps
            exchange(folder, 1)
            sampler.keeper.reconfigure({"revision": "2"}).result(60)
        return original(*arguments, **more)

    original = sampler.experts.velocities
    sampler.experts.velocities = change
    asked = {**ASKED, "num_inference_steps": 10}
    response = client.post(PATH, json=asked)
    assert response.json()["data"][0]["changed"] == [1]
    assert response.headers["x-paris-changed"] == "expert-1"
    again = client.post(PATH, json=asked)
    assert again.json()["data"][0]["changed"] == []
    assert "x-paris-changed" not in again.headers

    import base64
    import io

    from PIL import Image

    inside = json.loads(Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"]))).info["routing"])
    assert inside["changed"] == [1]
    assert inside["experts"][1]["fingerprint"] == f"{old}, then {published_name(folder, 1)}"
