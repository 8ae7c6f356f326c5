"""bfloat16 beside float32: how far velocities move, and what stays precise."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from paris_ray.models import DiT, Router


def fp32_model(layers: int = 12) -> DiT:
    """A model whose gates, tables, cross-attention and output are far from zero."""
    torch.manual_seed(0)
    model = DiT(image_size=16, hidden_size=96, num_layers=layers, num_heads=4, text_embed_dim=32)
    for name, parameter in model.named_parameters():
        if name.endswith(("cross_attn.out_proj.weight", "final_layer.linear.weight")):
            nn.init.xavier_uniform_(parameter)
        elif name == "t_block.1.weight":
            nn.init.normal_(parameter, std=0.1)
        elif name.endswith(("bias", "table")):
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(5, 4, 16, 16, generator=g), torch.tensor([0.0, 0.02, 0.35, 0.98, 1.0]), torch.randn(5, 9, 32, generator=g)


def in_bf16(model: nn.Module, how: str, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    with torch.no_grad():
        if how == "weights":
            return copy.deepcopy(model).bfloat16()(x.bfloat16(), t, text.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            return model(x, t, text)


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_velocities_in_bf16_are_within_two_percent(how: str) -> None:
    model, (x, t, text) = fp32_model(), inputs()
    with torch.no_grad():
        exact = model(x, t, text)
    found = in_bf16(model, how, x, t, text)
    assert found.dtype == torch.float32
    error = (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert 1e-4 < error.max() < 0.02, error  # the lower bound: something was in bfloat16


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_time_norms_modulation_and_the_last_layer_stay_in_fp32(how: str) -> None:
    """Their inputs and outputs are float32, and time and modulation are to the bit those of a float32 network with the same (rounded) weights."""
    model, (x, t, text) = fp32_model(layers=2), inputs()
    if how == "weights":
        model = model.bfloat16()
    rounded = copy.deepcopy(model).float()
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name in ("time_embed", "t_block", "final_layer.linear") or "norm" in name:
            module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output, name + " (in)": args[0]}))
    if how == "weights":
        x, text = x.bfloat16(), text.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        model(x, t, text)
    assert len(seen) == 2 * (3 + 2 * 2 + 1)
    assert {name: value.dtype for name, value in seen.items()} == dict.fromkeys(seen, torch.float32)
    with torch.no_grad():
        assert torch.equal(seen["time_embed"], rounded.time_embed(t))
        assert torch.equal(seen["t_block"], rounded.t_block(rounded.time_embed(t)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_times_in_half_precision_are_refused(dtype: torch.dtype) -> None:
    """Near 1, where sampling starts, times of bfloat16 are 1/256 apart, and steps are not."""
    model, (x, t, text) = fp32_model(layers=1), inputs()
    router = Router(3, image_size=16, hidden_size=96, num_layers=1, num_heads=4)
    for network, arguments in ((model, (text,)), (router, ())):
        with pytest.raises(ValueError, match=rf"t: times are {dtype}.*give them in float32"):
            network(x, t.to(dtype), *arguments)
        assert network(x, t.double(), *arguments).isfinite().all()


def test_gradients_under_autocast_point_where_those_of_fp32_do() -> None:
    model, (x, t, text) = fp32_model(layers=4).train(), inputs()

    def gradient(enabled: bool) -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(x, t, text)
        (output.float() - 1).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact, found = gradient(False), gradient(True)
    assert found.dtype == torch.float32
    assert (found - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_the_router_in_bf16_keeps_its_probabilities(how: str) -> None:
    torch.manual_seed(0)
    router = Router(8, image_size=16, hidden_size=96, num_layers=6, num_heads=4, text_embed_dim=32).eval()
    for name, parameter in router.named_parameters():
        if parameter.requires_grad and name != "head.2.weight":
            nn.init.normal_(parameter, std=0.5 if name == "head.4.weight" else 0.1)
    x, t, text = inputs()
    with torch.no_grad():
        exact = router(x, t, text[:, 0]).softmax(-1)
    assert exact.max(1).values.min() > 0.3  # it has opinions
    found = in_bf16(router, how, x, t, text[:, 0]).float().softmax(-1)
    assert (found - exact).abs().max() < 0.02


def precise(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_computed_in_fp32_is_kept_in_it(dtype: torch.dtype) -> None:
    """To the bit: not rounded on the way, and not cast at every forward pass."""
    model = fp32_model(layers=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.to(dtype)
    layers = ("time_embed.mlp.0", "time_embed.mlp.2", "t_block.1", "final_layer.linear")
    assert precise(model) == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert all(torch.equal(value, before[name].to(value.dtype)) for name, value in model.state_dict().items())
    router = Router(3, image_size=16, hidden_size=96, num_layers=1, num_heads=4, text_embed_dim=32).to(dtype)
    layers = ("time_embed.mlp.0", "time_embed.mlp.2", "text_proj", "layers.0.adaLN_modulation.1")
    assert precise(router) == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_weights_of_a_bfloat16_file_are_raised_once() -> None:
    """Such a file holds them in bfloat16, assigned as they are; setting the network to any precision makes them float32."""
    model = fp32_model(layers=1)
    model.load_state_dict({name: value.bfloat16() for name, value in model.state_dict().items()}, assign=True)
    assert not precise(model)
    assert "t_block.1.weight" in precise(model.to(torch.bfloat16))
    assert model.double().t_block[1].weight.dtype == torch.float64
