"""What the frozen encoders have in common: rows of a pass, precision, pooling."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paris_ray.data.encoders import frozen, in_chunks, pass_rows, pool


@pytest.mark.parametrize(
    ("left", "rows"),
    [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (9, 16), (100, 128), (128, 128), (129, 256), (256, 256), (257, 256), (10_000, 256)],
)
def test_rows_of_a_pass_on_a_gpu_are_the_next_power_of_two(left, rows):
    assert pass_rows(left, "cuda", 256) == pass_rows(left, torch.device("cuda", 1), 256) == rows


def test_rows_of_a_pass_on_a_cpu_never_change():
    """Matrix products there choose their kernels by shape."""
    assert {pass_rows(left, device, 256) for left in range(1, 300) for device in ("cpu", torch.device("cpu"))} == {8}
    assert {pass_rows(left, "cpu", 256, on_cpu=1) for left in range(1, 300)} == {1}


@pytest.mark.parametrize(
    ("device", "rows", "passes"),
    [("cuda", 300, [256, 64]), ("cuda", 512, [256, 256]), ("cuda", 1, [1]), ("cuda", 3, [4]), ("cpu", 9, [8, 8]), ("cpu", 1, [8])],
)
def test_chunks_give_every_row_once(device, rows, passes):
    seen = []

    def square(chunk):
        seen.append(len(chunk))
        return chunk**2

    x = torch.arange(rows * 2).view(rows, 2)
    assert torch.equal(in_chunks(square, x, device, 256), x**2)
    assert seen == passes


def test_frozen_encoders_know_no_autocast_and_no_gradients():
    weight, x = torch.randn(8, 8, requires_grad=True), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ weight).dtype == torch.bfloat16
        with frozen("cpu"):
            result = x @ weight
        assert (x @ weight).dtype == torch.bfloat16
    assert not result.requires_grad
    np.testing.assert_allclose(result.numpy(), x.numpy() @ weight.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_pooling():
    states = torch.arange(24.0).view(2, 3, 4)
    lengths = torch.tensor([2, 3], dtype=torch.int32)
    assert torch.equal(pool(states, lengths, "mean"), torch.stack([states[0, :2].mean(0), states[1].mean(0)]))
    assert torch.equal(pool(states, lengths, "last"), torch.stack([states[0, 1], states[1, 2]]))
