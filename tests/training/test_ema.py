from __future__ import annotations

import pytest
import torch
from torch import nn

from paris_ray.training.ema import Ema, decay


def test_half_life():
    """After one half-life of constant weights, the distance to them has halved."""
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    ema = Ema(model, half_life=64)
    nn.init.ones_(model.weight)
    for step in range(8):
        ema.update(images=10_000 + 8 * step, batch=8)
    torch.testing.assert_close(ema.weights["weight"], torch.full((2, 3), 0.5))


def test_closed_form():
    """average = Σ_i (1 − d_i)·Π_{j>i} d_j·w_i + Π_j d_j·w_0."""
    g = torch.Generator().manual_seed(0)
    values = torch.randn(40, 5, generator=g)
    model = nn.Module()
    model.w = nn.Parameter(values[0].clone())
    ema = Ema(model, half_life=100)
    decays = [decay(16 * i, 16, 100) for i in range(1, 40)]
    for i in range(1, 40):
        with torch.no_grad():
            model.w.copy_(values[i])
        ema.update(16 * i, 16)
    share = torch.ones(40, dtype=torch.float64)
    for i in range(40):
        share[i] = 1.0 if i == 0 else 1 - decays[i - 1]
        for d in decays[i:]:
            share[i] *= d
    assert share.sum().item() == pytest.approx(1.0)
    torch.testing.assert_close(ema.weights["w"].double(), share @ values.double(), rtol=1e-5, atol=1e-6)


def test_early_averages_do_not_hold_the_initial_weights():
    left = 1.0
    for images in range(16, 1601, 16):
        left *= decay(images, 16, half_life=1_700_000)
    assert left < 1e-9


def test_applied_and_frozen():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    ema = Ema(model, 10)
    own = model.weight.detach().clone()
    ema.weights["weight"].fill_(7.0)
    with ema.applied():
        assert (model.weight == 7).all()
    assert torch.equal(model.weight, own)
    with torch.no_grad():
        model.bias.fill_(3.0)
    before = ema.weights["bias"].clone()
    ema.update(100, 10)
    assert torch.equal(ema.weights["bias"], before)
    with pytest.raises(ValueError, match="names differ"):
        ema.load({"weight": own})
