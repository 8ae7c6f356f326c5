"""Weights against real networks, activations against what autograd keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paris_ray.config import ModelConfig, TrainConfig
from paris_ray.models.dit import DiT
from paris_ray.models.router import Router
from paris_ray.training.budget import Inputs
from paris_ray.training.memory import expert_activations, expert_weights, router_activations, router_weights

SHAPES = [
    (ModelConfig(hidden_size=64, num_layers=3, num_heads=4), Inputs(channels=4, side=16, text_tokens=7, text_width=24)),
    (ModelConfig(hidden_size=48, num_layers=2, num_heads=2, patch_size=4, mlp_ratio=2.5), Inputs(channels=3, side=32, text_tokens=3, text_width=8)),
]


def networks(model: ModelConfig, inputs: Inputs) -> dict[str, torch.nn.Module]:
    shape = {"image_size": inputs.side, "in_channels": inputs.channels, **model.model_dump(exclude={"size"})}
    return {
        "expert": DiT(out_channels=inputs.channels, text_embed_dim=inputs.text_width, **shape),
        "router": Router(5, text_embed_dim=inputs.text_width, **shape),
    }


@pytest.mark.parametrize(("model", "inputs"), SHAPES)
def test_weights_are_those_of_the_networks(model: ModelConfig, inputs: Inputs) -> None:
    made = {name: sum(p.numel() for p in network.parameters()) for name, network in networks(model, inputs).items()}
    assert (expert_weights(model, inputs), router_weights(model, inputs, 5)) == (made["expert"], made["router"])
    blind = Router(5, image_size=inputs.side, in_channels=inputs.channels, **model.model_dump(exclude={"size"}))
    assert router_weights(model, replace(inputs, text_width=0), 5) == sum(p.numel() for p in blind.parameters())


def test_the_papers_sizes() -> None:
    """Counts of the released checkpoint."""
    assert expert_weights(ModelConfig.model_validate({"size": "XL/2"}), Inputs(4, 32, 77, 768)) == 605_970_448
    assert router_weights(ModelConfig.model_validate({"size": "B/2"}), Inputs(4, 32, 77, 0), 8) == 129_136_904


def kept(network: torch.nn.Module, inputs: Inputs, name: str, precision: str, images: int) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(images, inputs.channels, inputs.side, inputs.side, generator=g), torch.rand(images, generator=g)
    text = torch.randn(images, *([inputs.text_tokens] if name == "expert" else []), inputs.text_width, generator=g)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        output = network(x, t, text)
        loss = (output.float() - torch.zeros_like(output, dtype=torch.float32)).square().mean()
    assert loss.requires_grad  # what was kept is alive until here
    return sum(storages.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["expert", "router"])
@pytest.mark.parametrize(("model", "inputs"), SHAPES)
def test_activations_are_bounded_and_not_by_much(model: ModelConfig, inputs: Inputs, name: str, checkpointing: bool, precision: str) -> None:
    network = networks(model, inputs)[name]
    network.gradient_checkpointing = checkpointing  # type: ignore[assignment]
    train = TrainConfig(precision=precision, gradient_checkpointing=checkpointing)  # type: ignore[arg-type]
    bound = (expert_activations if name == "expert" else router_activations)(model, inputs, train)
    # Of three images and eleven: weights cancel.
    counted = (kept(network, inputs, name, precision, 11) - kept(network, inputs, name, precision, 3)) / 8
    deeper = model.model_copy(update={"num_layers": model.num_layers + 1})
    block = (expert_activations if name == "expert" else router_activations)(deeper, inputs, train) - bound
    assert counted <= bound
    if not checkpointing:  # which computes one block at a time again: not kept, but needed
        assert bound < 1.9 * counted  # small networks have one block more of few
        more = networks(deeper, inputs)[name]
        another = (kept(more, inputs, name, precision, 11) - kept(more, inputs, name, precision, 3)) / 8 - counted
        assert 0.99 * another <= block < 1.25 * another
