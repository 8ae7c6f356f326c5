"""On a CPU a row has the same bits in any company, at one number of threads: networks are called with as many rows as there are, none filled up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paris_ray.diffusion.path import Flow
from paris_ray.inference.precision import set_precision
from paris_ray.models import DiT, Router
from paris_ray.models.layers import Linear, PreciseLinear

ROWS = 13
# Tokens 4, 16, 36: with grids whose tokens do not come in eights.
GRIDS = [2, 4, 6]


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}-threads")
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def drawn(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.15)
    return module.eval().requires_grad_(False)


def same_alone(network, *rows: torch.Tensor) -> None:
    """Batches of the first n rows give what the whole batch gives; and so does a row from the middle, alone."""
    with torch.inference_mode():
        whole = network(*rows)
        for n in (1, 2, 3, 5, 6, 7, 9, 12):
            assert torch.equal(network(*(x[:n].clone() for x in rows)), whole[:n]), n
        assert torch.equal(network(*(x[11:12].clone() for x in rows)), whole[11:12])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_experts(grid: int, precision: str) -> None:
    torch.manual_seed(grid)
    expert = drawn(DiT(image_size=2 * grid, in_channels=3, out_channels=3, hidden_size=48, num_layers=2, num_heads=4, text_embed_dim=20))
    expert = set_precision(expert, Flow(), precision)
    same_alone(expert, torch.randn(ROWS, 3, 2 * grid, 2 * grid), torch.rand(ROWS), torch.randn(ROWS, 7, 20))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("grid", GRIDS)
def test_routers(grid: int) -> None:
    torch.manual_seed(grid)
    router = drawn(Router(8, 2 * grid, 2, 3, hidden_size=48, num_layers=2, num_heads=4, text_embed_dim=20))
    same_alone(router, torch.randn(ROWS, 3, 2 * grid, 2 * grid), torch.rand(ROWS), torch.randn(ROWS, 20))


@pytest.mark.parametrize("kind", [Linear, PreciseLinear])
def test_filled_up_rows_leave_no_trace(kind: type[nn.Linear]) -> None:
    """Values and gradients are nn.Linear's, for any number of rows and dimensions."""
    torch.manual_seed(0)
    layer, plain = kind(6, 5).double(), nn.Linear(6, 5).double()
    plain.load_state_dict(layer.state_dict())
    for shape in ((1, 6), (3, 6), (8, 6), (3, 5, 6), (2, 1, 3, 6)):
        x = torch.randn(shape, dtype=torch.float64)
        for one in (layer, plain):
            one.zero_grad()
            one(x).square().sum().backward()
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=1e-13, atol=1e-13)
