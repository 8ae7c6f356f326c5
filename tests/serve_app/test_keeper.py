"""Experts that come, are exchanged and go, in one process and without Ray; the pictures against engines over fresh copies of the files."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

from paris_ray.inference.engine import Engine, ImageRequest, generate
from paris_ray.inference.weights import load_model
from paris_ray.layout import EXPERT_FILE
from paris_ray.manifest import fingerprint
from paris_ray.storage import Folder
from serve_app.api import create_app
from serve_app.deployments import Sampler
from serve_app.keeper import Keeper

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


def gone(folder):
    shutil.rmtree(folder / "expert_1")


@pytest.mark.parametrize("harm", [nothing_finite, half_written, of_another_shape, gone])
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
        assert states(Keeper(str(folder))) == ["ready", "missing", "ready"]


def test_a_user_config_that_makes_no_sense_changes_nothing_and_is_named(folder):
    keeper = Keeper(str(folder), indices=(0, 1))
    for wrong, said in [({"retired": [2]}, r"\[2\] are not here"), ({"revison": "2"}, "revison"), ({"retired": "x"}, "retired"), ([1], "")]:
        assert keeper.reconfigure(wrong) is None
        assert states(keeper) == ["ready", "ready"]
        assert all("user_config was refused" in state.reason and said.replace("\\", "") in state.reason for state in keeper.states())
    reconfigure(keeper, revision="2")
    assert [state.reason for state in keeper.states()] == ["", ""]


def test_health_runs_a_forward_of_an_expert_that_nobody_asks(folder):
    keeper = Keeper(str(folder))
    keeper.check(), keeper.check(), keeper.check()
    counts = list(keeper.experts.answered)
    for _ in range(3):
        keeper.check()
    assert [after - before for before, after in zip(counts, keeper.experts.answered, strict=True)] == [1, 1, 1]
    module, _ = keeper.experts._residents.get(1)
    next(module.parameters()).data.fill_(torch.nan)
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
