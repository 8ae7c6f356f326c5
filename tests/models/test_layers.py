"""Parts that the expert and the router share."""

import pytest
import torch
import torch.nn.functional as F

from paris_ray.models.layers import GELU

from .test_dit import gelu_tanh


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 4e-6)])
@pytest.mark.parametrize("compiled", [False, True])
def test_gelu_is_the_tanh_form(dtype: torch.dtype, tolerance: float, compiled: bool) -> None:
    gelu = torch.compile(GELU(), fullgraph=True) if compiled else GELU()
    x = torch.cat([torch.linspace(-12, 12, 997), torch.tensor([-1e4, 0.0, 1e4])]).to(dtype).requires_grad_()
    wanted = x.detach().double().requires_grad_()
    gelu_tanh(wanted).sum().backward()
    y = gelu(x)
    y.sum().backward()
    torch.testing.assert_close(y.double(), gelu_tanh(wanted), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad.double(), wanted.grad, rtol=tolerance, atol=tolerance)


def test_gelu_in_bfloat16_rounds_once() -> None:
    x = torch.linspace(-6, 6, 999).bfloat16()
    assert GELU()(x).equal(F.gelu(x, approximate="tanh"))
    assert (GELU()(x).double() - gelu_tanh(x.double())).abs().max() <= 2**-8 * 6  # half a unit in the last place of the largest


def test_gelu_under_vmap_and_grad() -> None:
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slopes = torch.func.vmap(torch.func.grad(lambda row: GELU()(row).sum()))(rows)
    wanted = torch.func.vmap(torch.func.grad(lambda row: F.gelu(row, approximate="tanh").sum()))(rows)
    torch.testing.assert_close(slopes, wanted, rtol=1e-12, atol=1e-12)
