"""Solvers as generators, guidance, noise by seed, and the driver that puts them together.

A solver is a generator: it yields (x, t) and is sent the velocity there, and it returns the final x. So the same Euler or Heun drives one image
in a notebook and a thousand, each at its own step, in the engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence

import numpy as np
import torch
from torch import Tensor

from paris_ray import rng
from paris_ray.diffusion.ensemble import Conditioning
from paris_ray.diffusion.path import expand

Solver = Generator[tuple[Tensor, float], Tensor, Tensor]
VelocityFn = Callable[[Tensor, Tensor], Tensor]


def time_grid(steps: int) -> list[float]:
    """Times from noise to data, steps + 1 of them: linear from 1 to 0.001, then 0.

    As diffusers' ``FlowMatchEulerDiscreteScheduler`` with 1000 training steps and shift 1.
    """
    if steps < 1:
        raise ValueError(f"steps: {steps} must be at least 1")
    return [*(float(s) for s in np.linspace(1.0, 0.001, steps)), 0.0]


def euler(x: Tensor, times: Sequence[float]) -> Solver:
    """Euler's method, order 1, one velocity a step."""
    for t, t_next in itertools.pairwise(times):
        v = yield x, t
        x = x + (t_next - t) * v
    return x


def heun(x: Tensor, times: Sequence[float]) -> Solver:
    """Heun's method, order 2, two velocities a step; Euler for the last, whose end t = 0 experts never saw."""
    for t, t_next in itertools.pairwise(times):
        v = yield x, t
        guess = x + (t_next - t) * v
        if t_next == 0:
            return guess
        v_next = yield guess, t_next
        x = x + (t_next - t) * (v + v_next) / 2
    return x


SOLVERS: dict[str, Callable[[Tensor, Sequence[float]], Solver]] = {"euler": euler, "heun": heun}


def evaluations(solver: str, steps: int) -> int:
    """How many velocities a solver asks for."""
    return steps if solver == "euler" else 2 * steps - 1


def initial_noise(seed: int, index: int, shape: tuple[int, ...]) -> Tensor:
    """The noise that picture ``index`` of a request with ``seed`` starts from; the same alone and in any batch, on any device. float32, CPU."""
    return torch.from_numpy(rng.normal(rng.key(seed, index), "noise", np.array([0]), shape)[0])


def guided(velocity: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """Classifier-free guidance inside one expert: v_u + s·(v_c − v_u), both branches in one batched call.

    Rows with s = 1 cost one pass.

    Args:
        velocity: (x, t, text states) → velocity.
        x: latents (n, C, H, W).
        t: times (n,).
        cond: conditioning of the n rows.
    """
    with_guidance = (cond.guidance != 1).nonzero().squeeze(1)
    if len(with_guidance) == 0:
        return velocity(x, t, cond.text)
    twice = torch.cat([torch.arange(len(x), device=x.device), with_guidance])
    both = velocity(x[twice], t[twice], torch.cat([cond.text, cond.null_text[with_guidance]]))
    v = both[: len(x)].clone()
    unconditional = both[len(x) :]
    scale = expand(cond.guidance[with_guidance].to(v.dtype), x)
    v[with_guidance] = unconditional + scale * (v[with_guidance] - unconditional)
    return v


class Cancelled(Exception):
    """Sampling was cancelled between two steps."""


def sample(
    velocity_fn: VelocityFn,
    noise: Tensor,
    times: Sequence[float],
    solver: str = "euler",
    callback: Callable[[int, Tensor, float], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Tensor:
    """Integrate from noise to data.

    Args:
        velocity_fn: (x (N, …), t (N,)) → velocity (N, …).
        noise: x at times[0], (N, …).
        times: decreasing times; see :func:`time_grid`.
        solver: ``euler`` or ``heun``.
        callback: called with (evaluation, x, t) before each velocity.
        cancelled: asked before each velocity.

    Raises:
        Cancelled: ``cancelled`` said so.
    """
    run = SOLVERS[solver](noise, times)
    x, t = next(run)
    step = 0
    while True:
        if cancelled is not None and cancelled():
            raise Cancelled(f"cancelled before evaluation {step} at t = {t:.3f}")
        if callback is not None:
            callback(step, x, t)
        v = velocity_fn(x, torch.full((x.shape[0],), t, dtype=x.dtype, device=x.device))
        try:
            x, t = run.send(v)
        except StopIteration as done:
            result: Tensor = done.value
            return result
        step += 1
