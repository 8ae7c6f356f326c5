"""Images against hand counts, arithmetic against torch's own counter, hours against the published cost."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from paris_ray.config import ModelConfig, TrainConfig
from paris_ray.models.dit import DiT
from paris_ray.models.router import Router
from paris_ray.training.budget import Inputs, expert_flops, gpu_hours, peak_flops, router_flops, total_images

SHAPES = [
    (ModelConfig(hidden_size=32, num_layers=3, num_heads=4), Inputs(channels=4, side=8, text_tokens=5, text_width=12)),
    (ModelConfig(hidden_size=48, num_layers=1, num_heads=2, patch_size=4, mlp_ratio=2.7), Inputs(channels=3, side=16, text_tokens=1, text_width=7)),
]

N = 8
"""Images in a batch; on a CPU, matrix products are padded to multiples of eight rows, which is no work that anybody needs."""


def counted(model: torch.nn.Module, *inputs: torch.Tensor, backward: bool = False) -> int:
    """As torch counts while it computes, with attention written out in matrix products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(*inputs)
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


def keywords(model: ModelConfig, inputs: Inputs) -> dict:
    return {"image_size": inputs.side, "in_channels": inputs.channels, "text_embed_dim": inputs.text_width, **model.model_dump(exclude={"size"})}


@pytest.mark.parametrize(("model", "inputs"), SHAPES)
def test_an_experts_arithmetic_is_what_torch_counts(model: ModelConfig, inputs: Inputs) -> None:
    expert = DiT(out_channels=inputs.channels, **keywords(model, inputs))
    batch = [torch.randn(N, inputs.channels, inputs.side, inputs.side), torch.rand(N), torch.randn(N, inputs.text_tokens, inputs.text_width)]
    assert counted(expert, *batch) == N * expert_flops(model, inputs)
    # Training is three times that, but for the gradients of what is not trained: the latent, the text, the sinusoids of the time.
    tokens, d = (inputs.side // model.patch_size) ** 2, model.hidden_size
    unneeded = d * (tokens * inputs.channels * model.patch_size**2 + inputs.text_tokens * inputs.text_width + 256)
    assert counted(expert, *batch, backward=True) == N * (3 * expert_flops(model, inputs) - 2 * unneeded)


@pytest.mark.parametrize(("model", "inputs"), SHAPES)
@pytest.mark.parametrize("reads_text", [True, False])
def test_a_routers_arithmetic_is_what_torch_counts(model: ModelConfig, inputs: Inputs, reads_text: bool) -> None:
    inputs = inputs if reads_text else Inputs(inputs.channels, inputs.side, inputs.text_tokens, 0)
    router = Router(num_clusters=5, **(keywords(model, inputs) | {"text_embed_dim": inputs.text_width or None}))
    batch = [torch.randn(N, inputs.channels, inputs.side, inputs.side), torch.rand(N), *([torch.randn(N, inputs.text_width)] if reads_text else [])]
    assert counted(router, *batch) == N * router_flops(model, inputs, 5)


def test_the_papers_expert_and_hours() -> None:
    """DiT-XL/2 with cross-attention at 256 tokens: about 290 GFLOP forward (counted elsewhere)."""
    flops = expert_flops(ModelConfig.model_validate({"size": "XL/2"}), Inputs(channels=4, side=32, text_tokens=77, text_width=768))
    assert flops == pytest.approx(290e9, rel=0.02)
    # An hour of an A100 at 40 % of 312 TFLOP/s is 4.49e17 operations.
    assert gpu_hours(4.4928e17, 312.0) == pytest.approx(1.0)


def test_peaks_are_found_by_a_drivers_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == pytest.approx(989.4e12)
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H200") == pytest.approx(989.4e12)
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA RTX A4000") is None


def settings(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"images": 160, "batch_size": 8, **changes})


def test_total_images_counts_whole_batches() -> None:
    assert total_images(settings(images=161), rows=5) == 168
    assert total_images(settings(images=None, passes=2.5, min_images=1), rows=30) == 80
    assert total_images(settings(images=None, passes=2.5, min_images=100), rows=30) == 104
