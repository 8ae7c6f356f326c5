"""The statistics that benchmarks report, against enumeration; and the operations that they count, against arithmetic."""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

import pytest
import torch

from paris_ray.models import DiT

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import flops, timing
from benchmarks.alternating import interval


@pytest.mark.parametrize("n", [6, 8, 9, 11, 14])
def test_the_interval_is_the_narrowest_that_covers_the_median(n: int) -> None:
    """Each value is below the true median or above it with equal odds: all 2ⁿ cases, one by one."""
    values = random.Random(n).sample(range(n), n)
    low, high = interval([float(value) for value in values])
    cases = [sum(case) for case in itertools.product((0, 1), repeat=n)]  # how many values lie below

    def covered(rank: int) -> float:
        """How often the median lies between the values that are `rank` from the ends."""
        return sum(rank + 1 <= below <= n - 1 - rank for below in cases) / len(cases)

    assert high == n - 1 - low
    assert covered(int(low)) >= 0.95 > covered(int(low) + 1)


def test_too_few_values_have_no_interval() -> None:
    with pytest.raises(ValueError, match="5 values are too few"):
        interval([1.0, 2.0, 3.0, 4.0, 5.0])
    with pytest.raises(ValueError, match="pairs: 8 is below 9"):
        timing.compare(lambda: None, lambda: None, 8, 1.0)


def test_blocks_alternate_and_ratios_are_theirs_over_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that the functions themselves move."""
    now, order = [0.0], []

    def work(name: str, cost: float) -> None:
        order.append(name)
        now[0] += cost

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    found = timing.compare(lambda: work("A", 0.5), lambda: work("B", 1.5), pairs=9, block_seconds=3.0)
    assert (found.ours, found.theirs, found.ratio, found.low, found.high, found.pairs, found.calls) == (0.5, 1.5, 3.0, 3.0, 3.0, 9, 2)
    assert "".join(order) == "AABB" + "B" + "".join(["AABB", "BBAA"] * 4 + ["AABB"])


def test_counted_operations_are_those_of_the_matrices() -> None:
    d, layers, tokens, words, width = 32, 3, 16, 5, 12
    torch.manual_seed(0)
    model = DiT(image_size=8, hidden_size=d, num_layers=layers, num_heads=4, text_embed_dim=width)
    found = flops.count(model, words)
    per_image = 2 * d * 256 + 2 * d * d + 2 * d * 6 * d  # time, modulation
    per_image += tokens * (2 * 16 * d + 2 * d * 16)  # patches, last layer
    text = words * 2 * width * d + layers * words * 2 * d * 2 * d
    block = tokens * (2 * d * 3 * d + 2 * d * d + 2 * d * d + 2 * d * d + 2 * 2 * d * 4 * d)  # qkv, out, cross q, cross out, MLP
    block += 4 * tokens * tokens * d + 4 * tokens * words * d  # attention, cross-attention
    assert found["forward"] == per_image + text + layers * block
    assert found["sampling step"] == per_image + layers * block
    # Backward: twice the forward, but for gradients of inputs that nobody asks for: latents, sinusoids, text.
    unasked = tokens * 2 * 16 * d + 2 * d * 256 + words * 2 * width * d
    assert found["training step"] == 3 * found["forward"] - unasked
