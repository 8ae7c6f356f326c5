"""Solvers of dx/dt = v(x, t) from noise (t = 1) to data (t = 0), as generators.

A solver yields (x, t), is sent the velocity there, and returns the final x. So the same Euler or Heun drives one image in a notebook and a
thousand, each at its own step, in the engine. Arithmetic on whatever x is: imports no torch, so that a front end can name solvers and count work.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Solver: TypeAlias = "Generator[tuple[Tensor, float], Tensor, Tensor]"


def time_grid(steps: int, solver: str = "euler") -> list[float]:
    """Times from noise to data, steps + 1 of them: linear from 1 to 0.001, then 0.

    As diffusers' ``FlowMatchEulerDiscreteScheduler`` with 1000 training steps and shift 1. For ``dpmpp_2m`` linear from 1 to 0, as diffusers' flow
    sigmas for its ``DPMSolverMultistepScheduler``: a step to 0.001 is many times as long in λ as the one before it, and D would be far off.

    Raises:
        ValueError: ``steps`` is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps: {steps} must be at least 1")
    if solver == "dpmpp_2m":
        return [1 - i / steps for i in range(steps)] + [0.0]
    return [*(float(s) for s in np.linspace(1.0, 0.001, steps)), 0.0]


def euler(x: Tensor, times: Sequence[float]) -> Solver:
    """Euler's method, order 1, one velocity a step: x ← x + (t′ − t)·v(x, t)."""
    for t, t_next in itertools.pairwise(times):
        v = yield x, t
        x = x + (t_next - t) * v
    return x


def heun(x: Tensor, times: Sequence[float]) -> Solver:
    """Heun's method, order 2, two velocities a step (arXiv 2206.00364, algorithm 1); Euler for the last, whose end t = 0 experts never saw."""
    for t, t_next in itertools.pairwise(times):
        v = yield x, t
        guess = x + (t_next - t) * v
        if t_next == 0:
            return guess
        v_next = yield guess, t_next
        x = x + (t_next - t) * (v + v_next) / 2
    return x


def midpoint(x: Tensor, times: Sequence[float]) -> Solver:
    """The midpoint method, order 2, two velocities a step: the one half-way, reached by Euler, carries the whole step."""
    for t, t_next in itertools.pairwise(times):
        v = yield x, t
        half = (t + t_next) / 2
        v = yield x + (half - t) * v, half
        x = x + (t_next - t) * v
    return x


def dpmpp_2m(x: Tensor, times: Sequence[float]) -> Solver:
    """DPM-Solver++(2M), order 2, one velocity a step (arXiv 2211.01095, algorithm 2; diffusers' ``DPMSolverMultistepScheduler``).

    With α = 1 − t and σ = t its step is x ← (t′/t)·x + (1 − t′/t)·D, which is Euler's towards D instead of x̂_0 = x − t·v. D extrapolates x̂_0 linearly
    in λ = log((1−t)/t) to the middle of the step: D = x̂_0 + h/(2h₋)·(x̂_0 − x̂_0₋), where h and h₋ are the lengths in λ of this step and of the one
    before. The first step has no step before it, and the last, to t = 0, has no middle, so both are Euler's; and so is the second after t = 1, where
    h₋ is infinite. On steps that are even in t the error from t = 1 is of order h²·log(1/h), because h/h₋ is far from 1 on the first few of them.
    """

    def log_ratio(t: float) -> float:
        return math.log((1 - t) / t) if t < 1 else -math.inf

    before: tuple[Tensor, float] | None = None  # x̂_0 and λ of the step before
    for t, t_next in itertools.pairwise(times):
        v = yield x, t
        x0, now = x - t * v, log_ratio(t)
        if before is not None and t_next > 0:
            x0_before, earlier = before
            ahead = (log_ratio(t_next) - now) / (2 * (now - earlier))
            v = v - ahead * (x0 - x0_before) / t  # (x − D)/t
        x = x + (t_next - t) * v
        before = x0, now
    return x


SOLVERS: dict[str, Callable[[Tensor, Sequence[float]], Solver]] = {"euler": euler, "heun": heun, "midpoint": midpoint, "dpmpp_2m": dpmpp_2m}

_A_STEP = {"euler": 1, "heun": 2, "midpoint": 2, "dpmpp_2m": 1}
"""Velocities a step; of Heun's last step only the first."""


def evaluations(solver: str, steps: int) -> int:
    """How many velocities a solver asks for on :func:`time_grid`.

    Raises:
        ValueError: no such solver.
    """
    _check(solver)
    return _A_STEP[solver] * steps - (solver == "heun")


def begins_step(solver: str, evaluation: int) -> bool:
    """Whether a solver's evaluation, counted from 0, is the first of its step: there experts are chosen, once for the whole step.

    A choice in the middle of a step would have one step mix two vector fields, and a solver of order 2 lose its order where the choice changes. The
    weights of those chosen are part of the field, and follow the state (:func:`paris_ray.diffusion.ensemble.reweighted`).

    Raises:
        ValueError: no such solver.
    """
    _check(solver)
    return evaluation % _A_STEP[solver] == 0


def _check(solver: str) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"solver: {solver!r} is not one of {', '.join(SOLVERS)}")
