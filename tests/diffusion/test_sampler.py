"""Solvers on equations with known answers, the published time grid, guidance, noise by seed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from paris_ray.diffusion.sampler import Cancelled, evaluations, guided, initial_noise, sample, time_grid

from .closed_form import Mixture, conditioning

F64 = torch.float64


def grid(steps: int, start: float = 1.0, end: float = 0.2) -> list[float]:
    return [start + (end - start) * i / steps for i in range(steps + 1)]


ODES = {
    # dx/dt = 2x: x(t) = x(1)·exp(2(t − 1))
    "linear": (lambda x, t: 2 * x, lambda x1, t: x1 * math.exp(2 * (t - 1))),
    # dx/dt = cos(5t)·x: x(t) = x(1)·exp((sin 5t − sin 5)/5)
    "forced": (lambda x, t: torch.cos(5 * t)[:, None] * x, lambda x1, t: x1 * math.exp((math.sin(5 * t) - math.sin(5)) / 5)),
    # dx/dt = −x²: x(t) = 1/(1/x(1) + t − 1)
    "nonlinear": (lambda x, t: -(x**2), lambda x1, t: 1 / (1 / x1 + t - 1)),
}


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("ode", sorted(ODES))
def test_observed_order(solver: str, order: int, ode: str) -> None:
    velocity, answer = ODES[ode]
    start = torch.tensor([[0.5], [0.7]], dtype=F64)
    errors = [float((sample(velocity, start, grid(steps), solver) - answer(start, 0.2)).abs().max()) for steps in (160, 320, 640)]
    observed = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert observed == pytest.approx([order, order], abs=0.1)


def test_straight_lines_are_exact_in_one_step() -> None:
    """With one data point v = (x − x_0)/t, and Euler lands on it in any number of steps."""
    x0 = torch.randn(2, 3, dtype=F64)
    for solver in ("euler", "heun"):
        for steps in (1, 4, 25):
            end = sample(lambda x, t: (x - x0) / t[:, None], torch.randn(2, 3, dtype=F64), time_grid(steps), solver)
            torch.testing.assert_close(end, x0, rtol=1e-9, atol=1e-9)


def test_sampling_the_closed_form_draws_the_data() -> None:
    """Noise pushed through the marginal flow of a mixture is distributed as the mixture: moments and shares of components."""
    mixture = Mixture(clusters=2, each=1, dim=2, seed=3)
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    end = sample(mixture.velocity, noise, time_grid(60), "heun")
    mean = (mixture.weights[:, None] * mixture.means).sum(0)
    second = (mixture.weights[:, None] * (mixture.means**2 + mixture.stds[:, None] ** 2)).sum(0)
    torch.testing.assert_close(end.mean(0), mean, rtol=0, atol=0.06)
    torch.testing.assert_close((end**2).mean(0), second, rtol=0.08, atol=0.05)


def test_evaluations_are_counted_right() -> None:
    for solver in ("euler", "heun"):
        for steps in (1, 2, 25):
            times: list[float] = []

            def velocity(x: Tensor, t: Tensor, times: list[float] = times) -> Tensor:
                times.append(float(t[0]))
                return x

            sample(velocity, torch.ones(1, 1), time_grid(steps), solver)
            assert len(times) == evaluations(solver, steps)
            assert min(times) > 0  # t = 0 is never asked for


@pytest.mark.parametrize("steps", [1, 2, 10, 25, 50, 1000])
def test_the_grid_is_diffusers_own(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(time_grid(steps), scheduler.sigmas.numpy(), atol=1e-6)
    assert len(time_grid(steps)) == steps + 1
    with pytest.raises(ValueError, match="steps: 0 must be at least 1"):
        time_grid(0)


def test_noise_is_the_same_alone_in_any_batch_and_between_calls() -> None:
    alone = initial_noise(7, 3, (4, 8, 8))
    together = [initial_noise(7, i, (4, 8, 8)) for i in (5, 3, 0)]
    assert torch.equal(alone, together[1])
    assert alone.dtype == torch.float32
    everything = torch.stack([initial_noise(seed, index, (4, 8, 8)) for seed in range(6) for index in range(6)])
    assert len({x.numpy().tobytes() for x in everything}) == 36
    # In particular seed s + 1, index i is not seed s, index i + 1.
    assert not torch.equal(initial_noise(1, 0, (9,)), initial_noise(0, 1, (9,)))
    assert stats.kstest(everything.flatten().numpy(), "norm").pvalue > 1e-3


class Net:
    """A model that counts its passes and rows."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        self.rows.append(len(x))
        return torch.tanh(x) * (1 + text.view(-1, 1, 1, 1)) + t.view(-1, 1, 1, 1)


@pytest.mark.parametrize("scales", [[1.0, 1.0, 1.0], [3.0, 7.5, 2.0], [1.0, 4.0, 1.0], [2.0, 1.0, 1.5]])
def test_guidance_is_the_formula_row_by_row_in_one_call(scales: list[float]) -> None:
    x, t = torch.randn(3, 2, 2, 2, dtype=F64), torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    cond = conditioning(3, torch.tensor(scales, dtype=F64))
    net, count = Net(), Net()
    v = guided(net, x, t, cond)
    for i, s in enumerate(scales):
        row = slice(i, i + 1)
        conditional, unconditional = count(x[row], t[row], cond.text[row]), count(x[row], t[row], cond.null_text[row])
        torch.testing.assert_close(v[row], unconditional + s * (conditional - unconditional), rtol=1e-12, atol=1e-12)
    # One call; a row without guidance is in it once, one with guidance twice.
    assert net.rows == [3 + sum(s != 1 for s in scales)]


def test_callbacks_and_cancelling() -> None:
    seen: list[tuple[int, float]] = []
    sample(lambda x, t: x, torch.ones(2, 1), time_grid(4), callback=lambda i, x, t: seen.append((i, t)))
    assert seen == list(enumerate(time_grid(4)[:-1]))
    with pytest.raises(Cancelled, match="before evaluation 2"):
        sample(lambda x, t: x, torch.ones(2, 1), time_grid(4), cancelled=iter([False, False, True]).__next__)
    with pytest.raises(KeyError):
        sample(lambda x, t: x, torch.ones(1, 1), time_grid(2), solver="none")
