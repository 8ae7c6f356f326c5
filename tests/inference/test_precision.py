"""int8 and bfloat16 beside float32, and experts that come and go."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import tiny_model
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from paris_ray.diffusion.path import Ddpm, Flow
from paris_ray.inference import weighing
from paris_ray.inference.engine import Engine, ImageRequest, generate
from paris_ray.inference.experts import ExpertError, LocalExperts
from paris_ray.inference.precision import quantize, set_precision, working_router
from paris_ray.inference.residency import Residents, free_memory, size
from paris_ray.inference.weights import load_model
from paris_ray.models import DiT, Router
from paris_ray.models.layers import PreciseLinear

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    return tiny_model.open_model(path, tiny_model.write_model(path))


def expert(layers=8):
    """Trained models have gates, tables, cross-attention and an output that are far from zero."""
    torch.manual_seed(0)
    module = DiT(image_size=16, hidden_size=96, num_layers=layers, num_heads=4, text_embed_dim=32)
    for name, parameter in module.named_parameters():
        if name.endswith(("cross_attn.out_proj.weight", "final_layer.linear.weight")):
            nn.init.xavier_uniform_(parameter)
        elif name == "t_block.1.weight":
            nn.init.normal_(parameter, std=0.1)
        elif name.endswith(("bias", "table")):
            nn.init.normal_(parameter, std=0.3)
    return module.eval().requires_grad_(False)


def inputs():
    g = torch.Generator().manual_seed(1)
    return torch.randn(5, 4, 16, 16, generator=g), torch.tensor([0.0, 0.02, 0.35, 0.98, 1.0]), torch.randn(5, 9, 32, generator=g)


@pytest.mark.parametrize("layers", [8, 28])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("precision", "limit"), [("int8", 0.05), ("bf16", 0.02)])
def test_velocities_are_near_those_of_fp32(precision, limit, device, layers):
    """At XL/2's depth too; and with what a GPU would be given, which computes int8 in bfloat16, here on a CPU."""
    x, t, text = inputs()
    exact = expert(layers)(x, t, text)
    module = set_precision(expert(layers), Flow(), precision, torch.device(device))
    dtype = module.patch_embed.weight.dtype
    assert dtype == (torch.float32 if (precision, device) == ("int8", "cpu") else torch.bfloat16)
    found = module(x.to(dtype), t, text.to(dtype)).float()
    error = (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert 1e-3 < error.max() < limit, error  # the lower bound: it was not float32 after all


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_what_is_computed_in_fp32_is_kept_in_it(precision):
    """Time, modulation and the last layer: no pass casts them, and nothing of them was rounded."""
    exact, module = expert(layers=2), set_precision(expert(layers=2), Flow(), precision, torch.device("cuda"))
    precise = [name for name, part in module.named_modules() if isinstance(part, PreciseLinear)]
    assert precise == ["time_embed.mlp.0", "time_embed.mlp.2", "t_block.1", "final_layer.linear"]
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[0] in precise:
            assert torch.equal(parameter, exact.get_parameter(name)), name
        else:
            assert parameter.dtype == torch.bfloat16, name


class Made(TorchDispatchMode):
    """Shapes and types of what operations make of integers."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (
            isinstance(out, torch.Tensor)
            and out.dtype != torch.int8
            and any(isinstance(one, torch.Tensor) and one.dtype == torch.int8 for one in args)
        ):
            self.found.append((tuple(out.shape), out.dtype))
        return out


def test_only_the_rows_that_a_product_needs_are_multiplied_out():
    """In the type of the product at once: width 96, of which cross-attention's queries are a third and its keys and values two."""
    module = set_precision(expert(layers=1), Flow(), "int8", torch.device("cuda"))
    attention, x = module.layers[0].cross_attn, torch.randn(1, 8, 96).bfloat16()
    pair, half = attention.keys_values(x), torch.bfloat16
    steps = {
        "queries": (lambda: attention.cross(x, pair), [((96, 96), half), ((96, 96), half)]),  # and out_proj
        "text": (lambda: attention.keys_values(x), [((192, 96), half)]),
        "self": (lambda: attention(x), [((288, 96), half), ((96, 96), half)]),
        "mlp": (lambda: module.layers[0].mlp(x), [((384, 96), half), ((96, 384), half)]),
    }
    for name, (step, expected) in steps.items():
        with Made() as made:
            step()
        assert made.found == expected, name


def opinionated():
    torch.manual_seed(0)
    router = Router(8, image_size=16, hidden_size=96, num_layers=6, num_heads=4, text_embed_dim=32).eval().requires_grad_(False)
    for name, parameter in router.named_parameters():
        if name not in ("head.2.weight", "pos_embed"):
            nn.init.normal_(parameter, std=0.5 if name == "head.4.weight" else 0.1)
    return router


def test_the_router_goes_with_its_experts_on_a_gpu():
    x, t, text = inputs()
    exact = opinionated()(x, t, text[:, 0])
    assert exact.softmax(-1).max(1).values.min() > 0.3  # it has opinions
    for precision in ("bf16", "int8"):
        given = opinionated()
        router = working_router(given, precision, torch.device("cuda"))
        assert (router.patch_embed.weight.dtype, router.layers[0].adaLN_modulation[1].weight.dtype) == (torch.bfloat16, torch.float32)
        found = router(x.bfloat16(), t, text[:, 0]).float().softmax(-1)
        assert 0 < (found - exact.softmax(-1)).abs().max() < 0.02
        assert torch.equal(given(x, t, text[:, 0]), exact)  # the model's own, which is also what is saved
    for precision, device in (("fp32", "cuda"), ("bf16", "cpu"), ("int8", "cpu")):
        assert working_router(given, precision, torch.device(device)) is given


def test_the_engine_asks_a_router_in_bf16(model, monkeypatch):
    requests = [ImageRequest("red fox", seed=i, routing="full", steps=1) for i in range(3)]
    exact = [result.routing[0]["weights"] for result in generate(model, requests)]
    half = working_router(model.router, "bf16", torch.device("cuda"))
    monkeypatch.setattr(weighing, "working_router", lambda router, precision, device: half)
    found = [result.routing[0]["weights"] for result in generate(dataclasses.replace(model), requests)]
    assert found != exact
    np.testing.assert_allclose(found, exact, atol=0.02)


def test_int8_is_the_network_whose_matrices_were_rounded():
    """Against float32 weights rounded here by the definition, row by row."""
    module = expert(layers=2)
    x, t, text = inputs()
    quantized = set_precision(expert(layers=2), Flow(), "int8")
    rounded = 0
    for name, parameter in module.named_parameters():
        if name.startswith("layers.") and parameter.dim() == 2 and not name.endswith("table"):
            rounded += 1
            for row in parameter.data:
                step = row.abs().max() / 127
                row.copy_(torch.round(row / step) * step)
    assert rounded == 2 * 6
    torch.testing.assert_close(quantized(x, t, text), module(x, t, text), rtol=1e-4, atol=1e-4)


def test_what_is_int8_and_what_is_not():
    exact, module = expert(layers=2), set_precision(expert(layers=2), Flow(), "int8")
    kept = {name for name, tensor in module.state_dict().items() if tensor.dtype == torch.int8}
    matrices = ("attn", "attn.out_proj", "cross_attn", "cross_attn.out_proj", "mlp.0", "mlp.2")
    assert kept == {f"layers.{i}.{name}.integers" for i in range(2) for name in matrices}
    assert {t.dtype for name, t in module.state_dict().items() if name not in kept} == {torch.float32}
    for name in ("pos_embed", "t_block.1.weight", "time_embed.mlp.0.weight", "text_proj.weight", "final_layer.linear.weight", "layers.1.mlp.2.bias"):
        assert torch.equal(module.get_parameter(name), exact.get_parameter(name)), name
    assert size(exact) == 4 * (sum(p.numel() for p in exact.parameters()) + 128)  # and the frequencies of the time
    in_blocks = sum(p.numel() for name, p in exact.named_parameters() if name.startswith("layers."))
    assert size(exact) - size(module) > 2.9 * in_blocks  # of 4 bytes a weight 1 is left, and a scale a row


def test_integers_use_their_range_and_rows_of_zeros_stay_zero():
    weight = torch.tensor([[0.5, -1.0, 0.25], [0.0, 0.0, 0.0], [1e-30, 2e-30, -3e-30]])
    integers, scale = quantize(weight)
    assert integers.tolist()[0] == [64, -127, 32]  # round half to even: 63.5 → 64, 31.75 → 32
    assert integers.tolist()[1] == [0, 0, 0]
    assert integers.tolist()[2] == [42, 85, -127]
    assert torch.allclose(integers * scale, weight, atol=1.0 / 254)


def test_experts_that_predict_noise_stay_in_fp32(model):
    for precision in ("bf16", "int8"):
        other = dataclasses.replace(model, precision=precision)
        module, objective = other.load_expert(1)
        assert isinstance(objective, Ddpm)
        assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float32}
        request = [ImageRequest("red fox", seed=1, routing="expert-1")]
        assert generate(other, request)[0].latent.tobytes() == generate(model, request)[0].latent.tobytes()


def test_int8_pictures_are_near_and_do_not_depend_on_company(model):
    small = dataclasses.replace(model, precision="int8")
    requests = [ImageRequest("red fox", seed=i, routing=["expert-0", "top-2", "full"][i % 3], guidance_scale=1.0, steps=3) for i in range(9)]
    pictures = generate(small, requests)
    for near, exact in zip(pictures, generate(model, requests), strict=True):
        error = np.linalg.norm(near.latent - exact.latent) / np.linalg.norm(exact.latent)
        assert 0 < error < 0.05
    assert generate(small, requests[4:5])[0].latent.tobytes() == pictures[4].latent.tobytes()


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(ValueError, match="precision: 'fp8' is not one of fp32, bf16, int8"):
        load_model(tmp_path, precision="fp8")


# -- experts that come and go ---------------------------------------------------------------------------------------------


def some():
    routings = ["top-2", "full", "expert-3", "threshold", "top-1", "caption"]
    return [ImageRequest(f"thing {i % 4}", seed=i, routing=routings[i % 6], steps=2 + i % 3) for i in range(12)]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_one_resident_expert_gives_the_same_pictures(model, precision):
    model = dataclasses.replace(model, precision=precision)
    everyone = Engine(model, LocalExperts(model))
    futures = [everyone.submit(request) for request in some()]
    everyone.run_until_idle()
    for resident in (1, 2, None):
        results = generate(model, some(), max_resident=resident)
        assert [r.latent.tobytes() for r in results] == [f.result().latent.tobytes() for f in futures]
        assert [r.routing for r in results] == [f.result().routing for f in futures]


def test_no_more_than_asked_are_in_memory_even_for_a_moment(model):
    alive, most = weakref.WeakSet(), []

    class Watched:
        num_experts, device, present, compile = model.num_experts, model.device, model.present, model.compile

        def load_expert(self, k, on_host):
            gc.collect()
            module, objective = model.load_expert(k, on_host)
            alive.add(module)
            most.append(len(alive))
            return module, objective

    experts = LocalExperts(Watched(), max_resident=1)
    assert not most  # nothing is loaded before it is asked
    assert experts.available() == [True] * 4
    engine = Engine(model, experts)
    engine.submit(ImageRequest("red fox", routing="full", steps=5))
    engine.run_until_idle()
    assert max(most) == 1
    # The one in memory is asked first: 4 loads in the first step, 3 in each other one.
    assert experts.loads == len(most) == 4 + 4 * 3
    assert sum(experts.resident) == 1


def test_memory_decides_how_many_stay(model):
    """A device of 3.6 experts; each takes 1 and wants 1.5 free before it comes."""
    one = size(model.load_expert(1)[0])
    here = []

    def load(k):
        here.append(k)
        return model.load_expert(k)

    residents = Residents(load, torch.device("cpu"), free=lambda device: int(3.6 * one) - one * len(residents))
    for k in (1, 3, 1, 3):
        residents.get(k)
    assert here == [1, 3]
    residents.get(0)  # 1.6 free, 1.5 needed: stays beside them
    residents.get(2)  # 0.6 free: the least recently used goes, then 1.6
    assert [k in residents for k in range(4)] == [True, False, True, True]
    starved = Residents(load, torch.device("cpu"), free=lambda device: 0)
    for k in (0, 1, 2):
        assert starved.get(k)[0] is not None  # one is always allowed
        assert len(starved) == 1
    with pytest.raises(ValueError, match="max_resident: 0 must be at least 1"):
        LocalExperts(model, max_resident=0)


def test_free_memory_is_what_the_system_says():
    import psutil

    free = free_memory(torch.device("cpu"))
    assert 0 < free <= psutil.virtual_memory().total


def test_a_lazy_expert_that_does_not_load_fails_those_who_ask_for_it(tmp_path):
    model = tiny_model.open_model(tmp_path, tiny_model.write_model(tmp_path))
    path = tmp_path / "expert_1" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:999])
    engine = Engine(model, LocalExperts(model, lazy=True))
    bad, good = engine.submit(ImageRequest("a", routing="expert-1")), engine.submit(ImageRequest("a", routing="expert-0"))
    engine.run_until_idle()
    with pytest.raises(ExpertError, match=r"expert 1: ValueError: .*not a whole safetensors file"):
        bad.result()
    assert good.result().image.shape == (16, 16, 3)
    with pytest.raises(ValueError, match="expert 9: there are experts 0…3"):
        LocalExperts(model, indices=[9], lazy=True)


def test_a_lazy_expert_can_be_replaced_and_retired(model):
    experts = LocalExperts(model, max_resident=2)
    engine = Engine(model, experts)
    engine.submit(ImageRequest("a", routing="expert-0", steps=1))
    engine.run_until_idle()
    experts.load(3)
    assert experts.resident == [True, False, False, True]
    experts.unload(0)
    assert experts.available() == [False, True, True, True]
    assert experts.resident == [False, False, False, True]
