"""The networks on a GPU: bfloat16, compiled blocks, and how far batching may move a row."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from paris_ray.inference.strict import load_expert
from paris_ray.models import DiT, Router
from paris_ray.storage import Folder

from .test_precision import fp32_model

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """float32 is float32: no TF32."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    yield
    for place, value in zip(places, before, strict=True):
        place.allow_tf32 = value


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(rows, 4, 16, 16, generator=g), torch.randn(rows, 9, 32, generator=g)
    return x.to(DEVICE), torch.linspace(0, 1, rows).to(DEVICE), text.to(DEVICE)


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest error of a row over its norm."""
    return ((found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max().item()


def forward(model: nn.Module, how: str, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    if how == "weights":
        return copy.deepcopy(model).bfloat16()(x.bfloat16(), t, text.bfloat16())
    with torch.autocast(DEVICE, torch.bfloat16, enabled=how == "autocast"):
        return model(x, t, text)


@torch.no_grad()
def test_fp32_is_the_cpus() -> None:
    model = fp32_model()
    expected = model(*(value.cpu() for value in inputs(5)))
    assert relative(model.to(DEVICE)(*inputs(5)).cpu(), expected) < 1e-4


@pytest.mark.parametrize("how", ["weights", "autocast"])
@torch.no_grad()
def test_velocities_in_bf16_are_within_two_percent(how: str) -> None:
    model = fp32_model().to(DEVICE)
    found = forward(model, how, *inputs(5))
    assert found.dtype == torch.float32
    assert 1e-4 < relative(found, model(*inputs(5))) < 0.02


@pytest.mark.parametrize(("how", "limit"), [("fp32", 1e-5), ("autocast", 0.01), ("weights", 0.01)])
@torch.no_grad()
def test_a_row_is_nearly_the_same_alone_and_among_others(how: str, limit: float) -> None:
    """The stated tolerance: other batch sizes take other kernels, which add in another order. On a CPU rows are equal to the bit."""
    model, batch = fp32_model().to(DEVICE), inputs(17)
    together = forward(model, how, *batch)
    alone = torch.cat([forward(model, how, *(value[i : i + 1] for value in batch)) for i in range(17)])
    assert relative(alone, together) < limit


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("bf16", 0.02)])
@pytest.mark.parametrize("kind", [DiT, Router])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_compute_the_same(kind: type[nn.Module], precision: str, limit: float, checkpointing: bool) -> None:
    """Forward and backward, in generated kernels."""
    torch.manual_seed(0)
    model = kind(image_size=16, hidden_size=64, num_layers=2, num_heads=4, text_embed_dim=32).to(DEVICE)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    x, t, text = inputs(4)
    text = text if kind is DiT else text[:, 0]

    def run() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
            output = model(x, t, text)
        output.float().square().mean().backward()
        return output.detach().float(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    output, gradient = run()
    torch._dynamo.reset()
    model.compile_blocks()
    model.gradient_checkpointing = checkpointing
    found, found_gradient = run()
    assert relative(found, output) < limit
    assert ((found_gradient - gradient).norm() / gradient.norm()).item() < limit


def test_a_loaded_expert_is_all_on_the_gpu(tmp_path: Path) -> None:
    """Also what its file does not hold."""
    model = fp32_model(layers=1)
    save_file(model.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    config = '{"hidden_size": 96, "num_layers": 1, "num_heads": 4, "text_embed_dim": 32}'
    (tmp_path / "config.json").write_text(config)
    loaded, _ = load_expert(Folder(tmp_path), 16, device=DEVICE)
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {DEVICE}
    with torch.no_grad():
        assert relative(loaded(*inputs(3)), model.to(DEVICE)(*inputs(3))) < 1e-6
