"""Conversions, schedules and objectives against their definitions and the closed form, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from paris_ray.diffusion import path

from .closed_form import Mixture

F64 = torch.float64
T = torch.tensor([1e-3, 0.1, 0.4999, 0.5, 0.5001, 0.9, 0.999], dtype=F64)


def draws(n: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_conversions_undo_each_other() -> None:
    x0, noise = draws(len(T), 2, 3, 3), draws(len(T), 2, 3, 3, seed=1)
    x, v = path.interpolate(x0, noise, T), noise - x0
    for i, t in enumerate(T.tolist()):
        torch.testing.assert_close(x[i], (1 - t) * x0[i] + t * noise[i], rtol=0, atol=0)
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(path.x0_from_velocity(x, T, v), x0, **close)
    torch.testing.assert_close(path.noise_from_velocity(x, T, v), noise, **close)
    torch.testing.assert_close(path.velocity_from_x0(x, T, x0), v, **close)
    torch.testing.assert_close(path.velocity_from_noise(x, T, noise), v, **close)


def test_velocity_is_the_time_derivative_of_the_path() -> None:
    x0, noise = draws(3, 4), draws(3, 4, seed=1)
    t = torch.tensor([0.2, 0.5, 0.8], dtype=F64)
    step = 1e-6
    v = (path.interpolate(x0, noise, t + step) - path.interpolate(x0, noise, t - step)) / (2 * step)
    _, _, target = path.Flow().training_pair(x0, noise, t)
    torch.testing.assert_close(target, v, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_schedules_preserve_variance_and_match_the_ratio(name: str) -> None:
    schedule = path.SCHEDULES[name]()
    n = torch.linspace(0.0, 1.0, 101, dtype=F64)
    alpha, sigma = schedule.alpha_sigma(n)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(n), rtol=1e-13, atol=1e-13)
    assert (alpha.diff() < 0).all()
    t = torch.linspace(0.001, 0.99, 300, dtype=F64)
    matched = schedule.match(t)
    alpha, sigma = schedule.alpha_sigma(matched)
    torch.testing.assert_close(alpha / sigma, (1 - t) / t, rtol=1e-9, atol=0)
    ends = schedule.match(torch.tensor([0.0, 1.0], dtype=F64))
    assert ends.tolist() == pytest.approx([0.0, 1.0], abs=1e-12)
    assert torch.isfinite(schedule.match(torch.tensor([0.0, 1.0]))).all()


def test_the_cosine_match_is_an_arc_tangent() -> None:
    for t in (0.0, 0.3, 0.5, 0.77, 1.0):
        found = float(path.CosineSchedule().match(torch.tensor([t], dtype=F64)))
        assert found == pytest.approx(2 / math.pi * math.atan2(t, 1 - t), abs=1e-15)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_times_are_matched_both_ways(name: str) -> None:
    schedule, n = path.SCHEDULES[name](), torch.linspace(0.001, 0.999, 101, dtype=F64)
    t = path.flow_time(schedule, n)
    alpha, sigma = schedule.alpha_sigma(n)
    torch.testing.assert_close((1 - t) / t, alpha / sigma, rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.match(t), n, rtol=1e-9, atol=1e-12)


def test_the_linear_schedule_is_the_integral_of_beta() -> None:
    for n in (0.1, 0.5, 1.0):
        integral, _ = integrate.quad(lambda s: 0.1 + s * (20 - 0.1), 0, n)
        alpha, _ = path.LinearSchedule().alpha_sigma(torch.tensor([n], dtype=F64))
        assert float(alpha) == pytest.approx(math.exp(-integral / 2), rel=1e-12)
    alpha, sigma = path.LinearSchedule().alpha_sigma(torch.tensor([1.0], dtype=F64))
    end = float(sigma / (alpha + sigma))  # the t of the linear path with the same ratio
    assert end == pytest.approx(0.9935, abs=1e-4)
    assert float(path.LinearSchedule().match(torch.tensor([0.999], dtype=F64))) == 1.0


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_matched_state_has_the_schedules_form(name: str) -> None:
    """x_t / √((1−t)² + t²) = α(n)·x_0 + σ(n)·ε, with the same x_0 and ε."""
    objective = path.Ddpm(name)  # type: ignore[arg-type]
    t = torch.tensor([0.01, 0.3, 0.6, 0.95], dtype=F64)
    x0, noise = draws(4, 5), draws(4, 5, seed=1)
    state, n = objective.model_input(path.interpolate(x0, noise, t), t)
    alpha, sigma = objective.schedule.alpha_sigma(n)
    torch.testing.assert_close(state, alpha[:, None] * x0 + sigma[:, None] * noise, rtol=1e-9, atol=1e-9)
    trained, time, target = objective.training_pair(x0, noise, n)
    torch.testing.assert_close(trained, state, rtol=1e-9, atol=1e-9)
    assert torch.equal(time, n)
    assert torch.equal(target, noise)


@pytest.mark.parametrize(("name", "latest"), [("cosine", 0.985), ("linear", 0.985)])
def test_the_true_noise_becomes_the_true_velocity(name: str, latest: float) -> None:
    objective = path.Ddpm(name)  # type: ignore[arg-type]
    t = torch.linspace(0.0, latest, 200, dtype=F64)
    x0, noise = draws(200, 3, 2), draws(200, 3, 2, seed=1)
    v = objective.velocity(noise, path.interpolate(x0, noise, t), t)
    torch.testing.assert_close(v, noise - x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_the_posterior_mean_noise_becomes_the_marginal_velocity(name: str) -> None:
    """ε̂ of a perfect model on the schedule's own state, from Bayes' rule there, against the velocity from Bayes' rule on the linear path."""
    mixture, objective = Mixture(), path.Ddpm(name)  # type: ignore[arg-type]
    t = torch.tensor([0.02, 0.2, 0.5, 0.8, 0.97], dtype=F64)
    x = 1.5 * draws(5, 4, seed=3)
    state, n = objective.model_input(x, t)
    alpha, sigma = objective.schedule.alpha_sigma(n)
    _, noise = mixture.expectations(state, alpha, sigma)
    torch.testing.assert_close(objective.velocity(noise, x, t), mixture.velocity(x, t), rtol=1e-8, atol=1e-8)


def clamped(name: str, x: float, t: float, noise: float) -> float:
    """The published rule at one number, in plain Python: arXiv 2603.06741 with the state matched by signal-to-noise ratio."""
    length = math.hypot(1 - t, t)
    if name == "cosine":
        alpha, sigma = (1 - t) / length, t / length
    else:
        # 19.9/4·n² + 0.05·n = −log α, up to the schedule's end.
        wanted = math.inf if t == 1 else -math.log((1 - t) / length)
        n = min(1.0, (-0.05 + math.sqrt(0.05**2 + 19.9 * wanted)) / (2 * 19.9 / 4))
        alpha = math.exp(-19.9 / 4 * n * n - 0.05 * n)
        sigma = math.sqrt(1 - alpha * alpha)
    x0 = (x / length - sigma * noise) / max(alpha, 0.01)
    return (x - min(20.0, max(-20.0, x0))) / t


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_beyond_the_guard_the_velocity_is_the_published_rules(name: str) -> None:
    """On (0.99, 1], where α ≥ 0.01 binds; and that it does bind."""
    g = torch.Generator().manual_seed(2)
    t = torch.cat([0.99 + 0.01 * torch.rand(300, generator=g, dtype=F64), torch.tensor([0.9902, 0.9935, 0.994, 1 - 1e-9, 1.0], dtype=F64)])
    x, noise = draws(len(t), 1, seed=5), draws(len(t), 1, seed=6)
    noise[::2] = x[::2] + 0.01 * noise[::2]  # near each other, as they are there; others far, so that |x̂_0| ≤ 20 binds too
    found = path.Ddpm(name).velocity(noise, x, t)  # type: ignore[arg-type]
    expected = [clamped(name, *numbers) for numbers in zip(x[:, 0].tolist(), t.tolist(), noise[:, 0].tolist(), strict=True)]
    torch.testing.assert_close(found[:, 0], torch.tensor(expected, dtype=F64), rtol=1e-9, atol=1e-9)
    x0 = x[:, 0] - t * found[:, 0]
    assert (x0.abs() < 19.999).sum() > 100
    assert (x0.abs() > 19.999).sum() > 20
    # The true noise no longer gives the true velocity: x̂_0 is α/0.01 of x_0, at t = 0.995 one half.
    if name == "cosine":
        x0, noise, t = draws(9, 1), draws(9, 1, seed=1), torch.full((9,), 0.995, dtype=F64)
        xt = path.interpolate(x0, noise, t)
        found = xt - 0.995 * path.Ddpm(name).velocity(noise, xt, t)
        torch.testing.assert_close(found, x0 * (0.005 / math.hypot(0.005, 0.995)) / 0.01, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_rows_bits_do_not_depend_on_how_many_there_are(name: str) -> None:
    objective = path.Ddpm(name)  # type: ignore[arg-type]
    x, output, t = (torch.randn(37, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    t = torch.sigmoid(t[:, 0])
    (states, times), v = objective.model_input(x, t), objective.velocity(output, x, t)
    for n in range(1, 37):
        some, when = objective.model_input(x[:n].clone(), t[:n].clone())
        assert torch.equal(some, states[:n])
        assert torch.equal(when, times[:n])
        assert torch.equal(objective.velocity(output[:n].clone(), x[:n].clone(), t[:n].clone()), v[:n])


def test_an_expert_is_a_velocity_whatever_it_predicts() -> None:
    """Perfect experts of one mixture, one that predicts velocity and two that predict noise on their own schedules: all the marginal velocity."""
    mixture, t = Mixture(), torch.tensor([0.02, 0.3, 0.5, 0.8, 0.97], dtype=F64)
    x, scale = 1.5 * draws(5, 4, seed=3), torch.tensor(2.0, dtype=F64)
    for objective in (path.Flow(), path.Ddpm("cosine"), path.Ddpm("linear")):

        def module(z: torch.Tensor, n: torch.Tensor, text: torch.Tensor, gain: float, objective: path.Objective = objective) -> torch.Tensor:
            if isinstance(objective, path.Flow):
                return text * gain * mixture.velocity(z, n)
            _, noise = mixture.expectations(z, *objective.schedule.alpha_sigma(n))  # type: ignore[attr-defined]
            return text * gain * noise

        v = path.as_velocity(module, objective)(x, t, scale, gain=0.5)
        torch.testing.assert_close(v, mixture.velocity(x, t), rtol=1e-8, atol=1e-8)
    # In the type that the module takes, and back in float32 or better.
    seen = []

    def half(z: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        seen.append((z.dtype, n.dtype))
        return z

    for objective in (path.Flow(), path.Ddpm()):
        v = path.as_velocity(half, objective, torch.bfloat16)(torch.randn(3, 4), torch.tensor([0.2, 0.6, 1.0]))
        assert v.dtype == torch.float32
    assert seen == [(torch.bfloat16, torch.float32)] * 2


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_velocities_stay_finite_and_bounded_at_the_ends(name: str) -> None:
    objective = path.Ddpm(name)  # type: ignore[arg-type]
    t = torch.tensor([0.0, 1e-7, 0.5, 1 - 1e-7, 1.0])
    v = objective.velocity(torch.randn(5, 8), torch.randn(5, 8), t)
    assert torch.isfinite(v).all()
    # α ≥ 0.01 and |x̂_0| ≤ 20 bound what a wrong ε̂ can do at t = 1.
    wild = objective.velocity(1000 * torch.ones(1, 8), torch.zeros(1, 8), torch.ones(1))
    assert wild.abs().max() <= path.X0_LIMIT
    half = objective.velocity(torch.randn(1, 8).bfloat16(), torch.randn(1, 8).bfloat16(), torch.tensor([0.9]))
    assert half.dtype == torch.float32


def test_flow_is_the_identity_on_velocities() -> None:
    x, t, v = draws(2, 3), torch.tensor([0.1, 0.9], dtype=F64), draws(2, 3, seed=1)
    assert torch.equal(path.Flow().velocity(v, x, t), v)
    assert all(torch.equal(a, b) for a, b in zip(path.Flow().model_input(x, t), (x, t), strict=True))


def test_training_times() -> None:
    u = torch.from_numpy(np.random.default_rng(0).random(20_000))
    assert torch.equal(path.training_times(u, "uniform"), u)
    t = path.training_times(u, "logit_normal")
    assert ((t > 0) & (t < 1)).all()
    assert stats.kstest(torch.logit(t).numpy(), "norm").pvalue > 1e-3
    assert torch.isfinite(path.training_times(torch.tensor([0.0, 1.0]), "logit_normal")).all()


def test_unknown_names_are_refused() -> None:
    for call in (lambda: path.objective("x"), lambda: path.Ddpm("x"), lambda: path.training_times(T, "x")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="'x' is not one of"):
            call()
    assert path.objective("flow").name == "flow"
    assert path.objective("ddpm", "linear").name == "ddpm"
