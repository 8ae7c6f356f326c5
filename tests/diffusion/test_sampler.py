"""Solvers on equations with known answers and against diffusers', the published time grid, guidance, noise by seed."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from paris_ray.config import SamplingConfig
from paris_ray.diffusion.ensemble import reweighted, routing_weights
from paris_ray.diffusion.routing import Routing
from paris_ray.diffusion.sampler import SOLVERS, Cancelled, begins_step, evaluations, guidance_at, guided, initial_noise, sample, time_grid

from .closed_form import Mixture, Velocity, conditioning

F64 = torch.float64


# -- solvers ------------------------------------------------------------------------------------------------------------


def grid(steps: int, start: float, end: float = 0.2) -> list[float]:
    return [start + (end - start) * i / steps for i in range(steps + 1)]


def slopes(solver: str, velocity: Velocity, answer: Callable[[Tensor, float, float], Tensor], start: float) -> list[float]:
    """The slope of the error's logarithm over two halvings of the step."""
    x = torch.tensor([[0.5], [0.7]], dtype=F64)
    errors = [float((sample(velocity, x, grid(steps, start), solver) - answer(x, start, 0.2)).abs().max()) for steps in (160, 320, 640)]
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


ODES = {
    # dx/dt = 2x: x(t) = x(s)·exp(2(t − s))
    "linear": (lambda x, t: 2 * x, lambda x, s, t: x * math.exp(2 * (t - s))),
    # dx/dt = cos(5t)·x: x(t) = x(s)·exp((sin 5t − sin 5s)/5)
    "forced": (lambda x, t: torch.cos(5 * t)[:, None] * x, lambda x, s, t: x * math.exp((math.sin(5 * t) - math.sin(5 * s)) / 5)),
    # dx/dt = −x²: x(t) = 1/(1/x(s) + t − s)
    "nonlinear": (lambda x, t: -(x**2), lambda x, s, t: 1 / (1 / x + t - s)),
}


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2), ("dpmpp_2m", 2)])
@pytest.mark.parametrize("ode", sorted(ODES))
def test_observed_order(solver: str, order: int, ode: str) -> None:
    assert slopes(solver, *ODES[ode], start=0.9) == pytest.approx([order, order], abs=0.1)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2), ("dpmpp_2m", 2)])
def test_order_on_the_flow_of_a_gaussian_from_pure_noise(solver: str, order: int) -> None:
    """Data N(m, s²): x_t is N((1−t)m, (1−t)²s² + t²), and the flow keeps each point at its quantile. At least that order: midpoint has 3."""
    m, s = 0.8, 0.3

    def std(t: float) -> float:
        return math.hypot((1 - t) * s, t)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        a, b = (1 - t)[:, None], t[:, None]
        return -m + (b - a * s**2) / (a**2 * s**2 + b**2) * (x - a * m)  # E[ε | x] − E[x_0 | x]

    found = slopes(solver, velocity, lambda x, t, end: (1 - end) * m + std(end) / std(t) * (x - (1 - t) * m), start=1.0)
    assert min(found) > order - 0.1


def test_straight_lines_are_exact_in_one_step() -> None:
    """With one data point v = (x − x_0)/t, and every solver lands on it in any number of steps."""
    x0 = torch.randn(2, 3, dtype=F64)
    for solver in SOLVERS:
        for steps in (1, 4, 25):
            end = sample(lambda x, t: (x - x0) / t[:, None], torch.randn(2, 3, dtype=F64), time_grid(steps), solver)
            torch.testing.assert_close(end, x0, rtol=1e-9, atol=1e-9)


def test_evaluations_are_counted_right() -> None:
    for solver in SOLVERS:
        for steps in (1, 2, 25):
            times: list[float] = []

            def velocity(x: Tensor, t: Tensor, times: list[float] = times) -> Tensor:
                times.append(float(t[0]))
                return x

            sample(velocity, torch.ones(1, 1), time_grid(steps), solver)
            assert len(times) == evaluations(solver, steps)
            assert min(times) > 0  # t = 0 is never asked for
            assert max(times) == 1.0
    with pytest.raises(ValueError, match="solver: 'none' is not one of euler, heun, midpoint, dpmpp_2m"):
        evaluations("none", 3)


def test_every_solver_can_be_a_runs_default() -> None:
    assert get_args(SamplingConfig.model_fields["solver"].annotation) == tuple(SOLVERS)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_networks_and_not_the_solvers(solver: str, dtype: torch.dtype) -> None:
    """Latents reach the network in its type, times in float32, and what adds up over the steps is kept in float32."""
    asked: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        assert (x.dtype, t.dtype) == (dtype, torch.float32)
        asked.append(float(t[0]))
        return torch.full_like(x, 1 / 3)

    noise = torch.linspace(1, 2, 33, dtype=F64).to(dtype)[:, None]
    result = sample(velocity, noise, time_grid(50), solver)
    exact: list[float] = []
    sample(lambda x, t: (exact.append(float(t[0])), x)[1], torch.ones(1, 1, dtype=F64), time_grid(50), solver)
    assert asked == [float(np.float32(t)) for t in exact]  # bfloat16 has no time between 0.98 and 0.984
    # A velocity of ⅓, as the type has it, over the whole of time; in steps of 1/50 bfloat16 would lose most of it.
    third = torch.full((1,), 1 / 3, dtype=dtype).double()
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), noise.double() - third, rtol=torch.finfo(dtype).eps, atol=1e-6)
    for wide in (torch.float32, F64):
        assert sample(lambda x, t: x * t[:, None], noise.to(wide), time_grid(3), solver).dtype == wide


def test_every_step_says_where_it_begins() -> None:
    """The evaluations that begin a step are those at the times of the grid where x is the solver's own, one for each step."""
    assert len(SOLVERS) == 4
    for solver, run in SOLVERS.items():
        ends: list[float] = []  # x after n steps is the end of a run over the first n of them
        for n in range(1, 6):
            ends.append(float(sample(lambda x, t: -x, torch.ones(1, 1, dtype=F64), [*time_grid(5)[:-1], 0.0005][: n + 1], solver)))
        generator = run(torch.ones(1, 1, dtype=F64), [*time_grid(5)[:-1], 0.0005])
        x, t = next(generator)
        beginnings, evaluation = [], 0
        while True:
            if begins_step(solver, evaluation):
                beginnings.append((t, float(x)))
            try:
                x, t = generator.send(-x)
            except StopIteration:
                break
            evaluation += 1
        assert [t for t, _ in beginnings] == time_grid(5)[:-1]
        assert [x for _, x in beginnings] == [1.0, *ends[:-1]]
    with pytest.raises(ValueError, match="solver: 'none' is not one of"):
        begins_step("none", 0)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_experts_are_chosen_once_a_step_and_order_is_kept_where_the_choice_changes(solver: str, order: int) -> None:
    """Two experts, dx/dt = x and dx/dt = −2x + 1, and a router whose argmax changes at t = 0.55, a time of every grid.

    The answer: exp on the first stretch, relaxation to ½ on the second. A choice made anew at Heun's second velocity, which lies at the end of the
    step, would take the step before the change for half the other's: an error of order 1.
    """
    x = torch.tensor([[0.5], [0.7]], dtype=F64)
    start, change, end = 0.9, 0.55, 0.2
    middle = x * math.exp(change - start)
    answer = 0.5 + (middle - 0.5) * math.exp(-2 * (end - change))
    asked: list[float] = []

    def route(x: Tensor, t: Tensor, chosen: Tensor | None = None) -> Tensor:
        if chosen is not None:
            return chosen
        asked.append(float(t[0]))
        return torch.where(t[:, None] > change + 1e-9, torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64))

    def velocity(x: Tensor, t: Tensor, weights: Tensor) -> Tensor:
        return weights[:, :1] * x + weights[:, 1:] * (1 - 2 * x)

    def error(steps: int, hold: bool) -> float:
        asked.clear()
        times = grid(steps, start, end)
        if hold:
            found = sample(velocity, x, times, solver, route=route)
            assert asked == times[:-1]  # once a step, at its beginning
        else:
            found = sample(lambda x, t: velocity(x, t, route(x, t)), x, times, solver)
        return float((found - answer).abs().max())

    errors = [error(steps, hold=True) for steps in (40, 80, 160)]
    assert [math.log2(a / b) for a, b in itertools.pairwise(errors)] == pytest.approx([order, order], abs=0.15)
    if solver == "heun":
        errors = [error(steps, hold=False) for steps in (40, 80, 160)]
        assert [math.log2(a / b) for a, b in itertools.pairwise(errors)] == pytest.approx([1, 1], abs=0.15)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_weights_follow_the_state_within_a_step_and_order_is_kept(solver: str, order: int) -> None:
    """Exact experts and the exact posterior of a mixture, against many more steps of Heun's method on the mixture's own velocity."""
    mixture = Mixture()
    experts = mixture.flow_experts()
    noise = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=F64)

    def route(x: Tensor, t: Tensor, chosen: Tensor | None) -> Tensor:
        logits = mixture.cluster_logits(x, t)
        return routing_weights(logits, Routing("full"), torch.ones(len(experts), dtype=torch.bool)) if chosen is None else reweighted(logits, chosen)

    def velocity(x: Tensor, t: Tensor, weights: Tensor) -> Tensor:
        return torch.stack([weights[:, k : k + 1] * expert(x, t) for k, expert in enumerate(experts)]).sum(0)

    # From where all experts have a part to where most rows have one.
    truth = sample(mixture.velocity, noise, grid(2560, 0.95, 0.3), "heun")
    errors = [float((sample(velocity, noise, grid(steps, 0.95, 0.3), solver, route=route) - truth).norm()) for steps in (40, 80, 160)]
    assert [math.log2(a / b) for a, b in itertools.pairwise(errors)] == pytest.approx([order, order], abs=0.35)


@pytest.mark.parametrize("times", [[999.0, 500.0, 0.0], [0.0, 0.5, 1.0], [1.0], [], [1.0, 0.5, 0.5], [1.0, -0.1], [float("nan"), 0.0]])
def test_times_that_do_not_go_down_are_refused(times: list[float]) -> None:
    with pytest.raises(ValueError, match=r"times: .* must go down from at most 1"):
        sample(lambda x, t: x, torch.ones(1, 1), times)


def test_dpmpp_2m_is_better_than_euler_on_its_own_grid() -> None:
    mixture = Mixture()
    noise = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    truth = sample(mixture.velocity, noise, [*np.linspace(1.0, 0.0, 4001)], "heun")
    for steps in (5, 10, 25, 50):
        errors = {name: float((sample(mixture.velocity, noise, time_grid(steps, name), name) - truth).norm()) for name in ("euler", "dpmpp_2m")}
        assert errors["dpmpp_2m"] < errors["euler"] / 1.2, (steps, errors)
    with pytest.raises(ValueError, match="steps: 0 must be at least 1"):
        time_grid(0, "dpmpp_2m")


@pytest.mark.parametrize("steps", [1, 2, 10, 25, 50, 1000])
def test_the_grid_is_diffusers_own(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(time_grid(steps), scheduler.sigmas.numpy(), atol=1e-6)
    assert len(time_grid(steps)) == steps + 1
    with pytest.raises(ValueError, match="steps: 0 must be at least 1"):
        time_grid(0)


def with_scheduler(scheduler: object, velocity: Velocity, x: Tensor, sigmas: Sequence[float] | None) -> tuple[Tensor, list[float]]:
    """Sample with one of diffusers' schedulers, at given sigmas or its own; the result and the sigmas."""
    if sigmas is not None:
        scheduler.sigmas = torch.tensor(sigmas, dtype=F64)  # type: ignore[attr-defined]
    used = scheduler.sigmas.tolist()  # type: ignore[attr-defined]
    scheduler.set_begin_index(0)  # type: ignore[attr-defined]
    for t, time in zip(used[:-1], scheduler.timesteps, strict=True):  # type: ignore[attr-defined]
        x = scheduler.step(velocity(x, torch.full((len(x),), t, dtype=F64)), time, x).prev_sample  # type: ignore[attr-defined]
    return x, used


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25, 50])
@pytest.mark.parametrize("own", [False, True], ids=["our-times", "diffusers-times"])
def test_dpmpp_2m_is_diffusers_own(steps: int, own: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=2, algorithm_type="dpmsolver++", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )
    scheduler.set_timesteps(steps)
    mixture = Mixture()
    noise = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    expected, times = with_scheduler(scheduler, mixture.velocity, noise, None if own else time_grid(steps))
    if own:  # but for 0.999 of its first time, which ours makes 1
        np.testing.assert_allclose(time_grid(steps, "dpmpp_2m"), times, atol=1.1e-3)
    # diffusers steps in float32.
    found = sample(mixture.velocity, noise, times, "dpmpp_2m")
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    # Which is no other solver's end.
    if steps > 3:
        assert min(float((sample(mixture.velocity, noise, times, other) - expected).abs().max()) for other in SOLVERS if other != "dpmpp_2m") > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_euler_is_diffusers_own(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    scheduler.set_timesteps(steps)
    mixture = Mixture()
    noise = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    expected, _ = with_scheduler(scheduler, mixture.velocity, noise, None)
    torch.testing.assert_close(sample(mixture.velocity, noise, time_grid(steps), "euler"), expected, rtol=2e-5, atol=2e-5)


def test_solvers_and_their_costs_need_no_torch() -> None:
    """A front end counts the work of a request with them."""
    code = "import sys; from paris_ray.diffusion import solvers; print(solvers.evaluations('heun', 5), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["9", "False"]


# -- noise and guidance -------------------------------------------------------------------------------------------------


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

    def __call__(self, x: Tensor, t: Tensor, text: Tensor | list[Tensor]) -> Tensor:
        self.rows.append(len(x))
        text = text if isinstance(text, Tensor) else torch.stack(text)
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
    # Where the latents are, nothing is waited for: torch's meta device has no numbers.
    there = dataclasses.replace(cond, text=cond.text.to("meta"), null_text=cond.null_text.to("meta"))
    assert guided(Net(), x.to("meta"), t.to("meta"), there).device.type == "meta"
    # Texts in lists, as those who keep them row by row have them.
    one_by_one = dataclasses.replace(
        cond, text=list(cond.text), null_text=[None if s == 1 else row for s, row in zip(scales, cond.null_text, strict=True)]
    )
    assert torch.equal(guided(Net(), x, t, one_by_one), v)


INTERVALS = [(0.0, 1.0), (0.2, 0.8), (0.5, 1.0), (0.0, 0.3), (0.9995, 1.0)]


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("interval", INTERVALS)
def test_guidance_in_an_interval_is_two_velocities_inside_and_one_outside(solver: str, interval: tuple[float, float]) -> None:
    """Three rows, one of them without guidance, against a velocity that decides by itself, row by row."""
    x, scales, cond = torch.randn(3, 2, 2, 2, dtype=F64), [3.0, 1.0, 7.5], conditioning(3)
    net, rows, alone = Net(), [], Net()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        scale = torch.tensor([guidance_at(float(t[0]), s, interval) for s in scales], dtype=F64)
        return guided(net, x, t, dataclasses.replace(cond, guidance=scale))

    def plain(x: Tensor, t: Tensor) -> Tensor:
        inside = interval[0] <= float(t[0]) <= interval[1]
        rows.append(5 if inside else 3)
        conditional, unconditional = alone(x, t, cond.text), alone(x, t, cond.null_text)
        guided_row = torch.tensor([inside and s != 1 for s in scales]).view(3, 1, 1, 1)
        scale = torch.tensor(scales, dtype=F64).view(3, 1, 1, 1)
        return torch.where(guided_row, unconditional + scale * (conditional - unconditional), conditional)

    found, expected = sample(velocity, x, time_grid(10), solver), sample(plain, x, time_grid(10), solver)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # Outside of the interval each row is in the one call once.
    assert net.rows == rows
    assert len(set(rows)) == (1 if interval == (0.0, 1.0) else 2)


def test_callbacks_and_cancelling() -> None:
    seen: list[tuple[int, float]] = []
    sample(lambda x, t: x, torch.ones(2, 1), time_grid(4), callback=lambda i, x, t: seen.append((i, t)))
    assert seen == list(enumerate(time_grid(4)[:-1]))
    with pytest.raises(Cancelled, match="before evaluation 2"):
        sample(lambda x, t: x, torch.ones(2, 1), time_grid(4), cancelled=iter([False, False, True]).__next__)
    with pytest.raises(ValueError, match="solver: 'none' is not one of euler"):
        sample(lambda x, t: x, torch.ones(1, 1), time_grid(2), solver="none")
