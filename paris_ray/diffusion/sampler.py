"""Guidance, noise by seed, and the driver that puts a solver, a velocity and noise together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from paris_ray import rng
from paris_ray.diffusion.ensemble import Conditioning
from paris_ray.diffusion.path import expand
from paris_ray.diffusion.solvers import SOLVERS, Solver, dpmpp_2m, euler, evaluations, heun, midpoint, time_grid

__all__ = [
    "SOLVERS", "WHOLE_RANGE", "Cancelled", "Solver", "VelocityFn", "dpmpp_2m", "euler", "evaluations", "guidance_at", "guided", "heun",
    "initial_noise", "midpoint", "sample", "time_grid",
]  # fmt: skip

VelocityFn = Callable[[Tensor, Tensor], Tensor]


def initial_noise(seed: int, index: int, shape: tuple[int, ...]) -> Tensor:
    """The noise that picture ``index`` of a request with ``seed`` starts from; the same alone and in any batch, on any device. float32, CPU."""
    return torch.from_numpy(rng.normal(rng.key(seed, index), "noise", np.array([0]), shape)[0])


WHOLE_RANGE = (0.0, 1.0)
"""The guidance interval that guides everywhere."""


def guidance_at(t: float, scale: float, interval: tuple[float, float] = WHOLE_RANGE) -> float:
    """The guidance scale of a row at time t: ``scale`` inside of the interval, ends included, and 1 outside, where it then costs one pass.

    Kynkäänniemi et al., arXiv 2404.07724: guidance at high noise narrows what can be drawn, and at low noise it does little for its cost. Their
    interval is one of noise levels σ; here σ = t/(1 − t), so t = σ/(1 + σ).

    Args:
        t: time in [0, 1]; 1 is noise.
        scale: guidance scale, 1 is off.
        interval: lowest and highest time with guidance.
    """
    low, high = interval
    return scale if low <= t <= high else 1.0


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
        noise: x at times[0], (N, …). In a type below float32 it says what ``velocity_fn`` takes; times and the solver's state are float32 or wider.
        times: decreasing times; see :func:`time_grid`.
        solver: ``euler``, ``heun``, ``midpoint`` or ``dpmpp_2m``.
        callback: called with (evaluation, x, t) before each velocity.
        cancelled: asked before each velocity.

    Returns:
        x at times[-1], (N, …), of the noise's type.

    Raises:
        Cancelled: ``cancelled`` said so.
        ValueError: no such solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: {solver!r} is not one of {', '.join(SOLVERS)}")
    wide = torch.promote_types(noise.dtype, torch.float32)  # steps of bfloat16 near t = 1 are 1/256
    run = SOLVERS[solver](noise.to(wide), times)
    x, t = next(run)
    step = 0
    while True:
        if cancelled is not None and cancelled():
            raise Cancelled(f"cancelled before evaluation {step} at t = {t:.3f}")
        if callback is not None:
            callback(step, x, t)
        v = velocity_fn(x.to(noise.dtype), torch.full((x.shape[0],), t, dtype=wide, device=x.device))
        try:
            x, t = run.send(v.to(wide))
        except StopIteration as done:
            result: Tensor = done.value
            return result.to(noise.dtype)
        step += 1
