"""``generate(model, …)`` keeps the experts it has loaded with the model, for its next call, and lets go of them with it."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref

import pytest
import tiny_model
import torch

from paris_ray.inference import weights
from paris_ray.inference.engine import Engine, ImageRequest, generate
from paris_ray.inference.experts import LocalExperts


@pytest.fixture
def model(tmp_path):
    return tiny_model.open_model(tmp_path, tiny_model.write_model(tmp_path))


@pytest.fixture
def read(monkeypatch):
    """The experts read from their files, in order."""
    read = []
    load = weights.load_expert
    monkeypatch.setattr(weights, "load_expert", lambda folder, *a, **k: read.append(int(folder.uri[-1])) or load(folder, *a, **k))
    return read


def ask(routing="full", **fields):
    return ImageRequest("red fox", routing=routing, steps=3, **fields)


def test_each_expert_is_read_once_however_many_calls(model, read):
    first = generate(model, [ask("expert-2")])
    assert read == [2]
    again = generate(model, [ask("expert-2"), ask()])
    assert sorted(read) == [0, 1, 2, 3]
    assert again[0].latent.tobytes() == first[0].latent.tobytes()
    apart = Engine(model, LocalExperts(model))
    future = apart.submit(ask())
    apart.run_until_idle()
    assert again[1].latent.tobytes() == future.result().latent.tobytes()


def test_what_they_were_loaded_for_has_changed(model, read):
    fp32 = generate(model, [ask("expert-0")])[0]
    model.precision = "int8"
    assert generate(model, [ask("expert-0")])[0].latent.tobytes() != fp32.latent.tobytes()
    generate(model, [ask("expert-0")], max_resident=1)
    assert read == [0, 0, 0]
    model.present[1] = False
    assert generate(model, [ask()])[0].degraded == [1]
    # A copy with another setting has an engine of its own.
    assert generate(dataclasses.replace(model, precision="fp32"), [ask("expert-0")])[0].latent.tobytes() == fp32.latent.tobytes()


def test_what_is_replaced_in_memory_counts(model):
    before = generate(model, [ask()])[0]
    model.router.head[4].bias.data += torch.tensor([9.0, 0.0, 0.0, 0.0])
    assert generate(model, [ask()])[0].routing != before.routing


def test_experts_go_with_the_model(tmp_path):
    model = tiny_model.open_model(tmp_path, tiny_model.write_model(tmp_path))
    generate(model, [ask()])
    experts = weakref.ref(model.own_engine[1].experts)
    gc.disable()  # at once, not when the collector comes round
    try:
        del model
        assert experts() is None
    finally:
        gc.enable()


def test_a_call_that_is_cut_off_leaves_nothing_behind(model):
    with pytest.raises(ValueError, match="steps"):
        generate(model, [ask(), ask(seed=1), dataclasses.replace(ask(), steps=0)])
    engine = model.own_engine[1]
    generate(model, [ask(seed=2)])
    assert engine is model.own_engine[1]
    assert (engine.metrics["finished"], engine.metrics["cancelled"]) == (1, 2)


def test_two_threads_may_ask_at_once(model):
    requests = [[ask(seed=i, index=k) for k in range(3)] for i in range(2)]
    found = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: generate(model, requests[i])})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        expected = generate(dataclasses.replace(model), requests[i])
        assert [r.latent.tobytes() for r in found[i]] == [r.latent.tobytes() for r in expected]
