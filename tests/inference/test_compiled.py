"""Sampling with compiled blocks: the same pictures within rounding, wherever experts come from and go to."""

from __future__ import annotations

import pytest
import tiny_model
import torch
import torch._dynamo

from paris_ray.inference.engine import Engine, ImageRequest
from paris_ray.inference.experts import LocalExperts
from paris_ray.models.network import Network

REQUESTS = [ImageRequest(p, seed=s, steps=3, routing=r) for p, s, r in (("red fox", 1, "full"), ("blue", 2, "top-2"), ("a dog", 3, "caption"))]


@pytest.fixture
def model(tmp_path, monkeypatch):
    # The captured graphs run as they are: to generate code would take minutes here.
    compile_blocks = Network.compile_blocks
    monkeypatch.setattr(Network, "compile_blocks", lambda self: compile_blocks(self, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return tiny_model.open_model(tmp_path, tiny_model.write_model(tmp_path))


def draw(model, experts):
    engine = Engine(model, experts)
    futures = [engine.submit(request) for request in REQUESTS]
    engine.run_until_idle()
    return [future.result().latent for future in futures]


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("settings", [{}, {"max_resident": 1}], ids=["all in memory", "one at a time"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_pictures_are_those_of_blocks_that_are_not_compiled(model, settings, precision):
    model.precision = precision
    plain = draw(model, LocalExperts(model))
    assert not graphs()
    model.compile = True
    experts = LocalExperts(model, **settings)
    for one, other in zip(draw(model, experts), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    # Experts of two widths (in int8 those of flow alone are), and the router's blocks.
    assert graphs() >= 3
    once = graphs()
    draw(model, experts)
    assert graphs() == once  # an expert that comes again brings nothing new
