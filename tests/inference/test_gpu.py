"""The engine on a GPU: what the rest shows with stand-ins. Skipped without one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny_model
import torch

from paris_ray.diffusion.ensemble import ensemble_velocity
from paris_ray.inference.engine import Engine, ImageRequest, generate
from paris_ray.inference.experts import LocalExperts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda")


class Codec(tiny_model.Codec):
    def decode(self, latents):
        return super().decode(latents.cpu())


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """float32 is float32: no TF32."""
    for place in (torch.backends.cuda.matmul, torch.backends.cudnn):
        monkeypatch.setattr(place, "allow_tf32", False)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = tiny_model.open_model(path, tiny_model.write_model(path))
    there = tiny_model.open_model(path, model.info)
    there.router.to(CUDA)
    return model, dataclasses.replace(there, codec=Codec(), device=CUDA, null_text=there.null_text.to(CUDA))


def some():
    routings = ["top-2", "full", "expert-3", "caption", "top-1"]
    return [ImageRequest(f"thing {i}", seed=i, steps=4, routing=routings[i % 5], guidance_scale=1.0 + 2 * (i % 2), solver="heun") for i in range(9)]


def test_pictures_are_those_of_the_cpu_alone_and_in_company(models):
    here, there = models
    expected = generate(here, some())
    together = generate(there, some())
    alone = [generate(there, [request])[0] for request in some()]
    for one, other, exact in zip(alone, together, expected, strict=True):
        for found in (one, other):
            assert np.linalg.norm(found.latent - exact.latent) < 0.01 * np.linalg.norm(exact.latent)


def test_nothing_waits_between_the_router_and_the_end(models, monkeypatch):
    """CUDA's own account: an operation that waits for the device raises."""
    _, there = models
    engine = Engine(there, LocalExperts(there))
    futures = [engine.submit(request) for request in some()]
    engine.tick()  # texts are projected, memory is pinned

    def watched(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return ensemble_velocity(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr("paris_ray.inference.engine.ensemble_velocity", watched)
    engine.run_until_idle()
    assert all(future.result() for future in futures)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_one_on_the_device_and_the_others_in_host_memory(models, precision):
    there = dataclasses.replace(models[1], precision=precision)
    results = {}
    for resident in (None, 1):
        experts = LocalExperts(there, lazy=True, max_resident=resident)
        engine = Engine(there, experts)
        futures = [engine.submit(request) for request in some()]
        engine.run_until_idle()
        results[resident] = [future.result().latent for future in futures]
        assert experts.loads == 4
    assert sum(experts.resident) == 1
    assert all(tensor.is_pinned() for module, _ in experts._residents._waiting.values() for tensor in module.parameters())
    for one, other in zip(results[None], results[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
