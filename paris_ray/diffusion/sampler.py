"""Guidance, noise by seed, and the driver that puts a solver, a velocity and noise together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paris_ray import rng
from paris_ray.diffusion.ensemble import Conditioning, Rows, take, upload
from paris_ray.diffusion.path import expand
from paris_ray.diffusion.solvers import SOLVERS, Solver, begins_step, dpmpp_2m, euler, evaluations, heun, midpoint, time_grid

__all__ = [
    "SOLVERS", "WHOLE_RANGE", "Cancelled", "Solver", "begins_step", "dpmpp_2m", "euler", "evaluations", "guidance_at", "guided", "heun",
    "initial_noise", "midpoint", "sample", "time_grid",
]  # fmt: skip


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


def guided(velocity: Callable[[Tensor, Tensor, Any], Tensor], x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """Classifier-free guidance inside one expert: v_u + s·(v_c − v_u), both branches in one batched call.

    Rows with s = 1 cost one pass.

    Args:
        velocity: (x, t, texts) → velocity; the texts are a tensor or a list, as those of ``cond`` are.
        x: latents (n, C, H, W).
        t: times (n,).
        cond: conditioning of the n rows; the null text of a row without guidance is not looked at.
    """
    rows = [row for row, scale in enumerate(cond.guidance.tolist()) if scale != 1]
    if not rows:
        return velocity(x, t, cond.text)
    n, numbers = len(x), upload(torch.stack([torch.tensor(rows).double(), cond.guidance[rows].double()]), x.device)
    index = numbers[0].long()
    null = take(cond.null_text, rows, index)
    texts: Rows = torch.cat([cond.text, null]) if isinstance(cond.text, Tensor) and isinstance(null, Tensor) else [*cond.text, *null]
    both = velocity(torch.cat([x, x[index]]), torch.cat([t, t[index]]), texts)
    unconditional, scale = both[n:], expand(numbers[1].to(both.dtype), x)
    return both[:n].index_copy(0, index, unconditional + scale * (both[index] - unconditional))


class Cancelled(Exception):
    """Sampling was cancelled between two steps."""


def sample(
    velocity_fn: Callable[..., Tensor],
    noise: Tensor,
    times: Sequence[float],
    solver: str = "euler",
    callback: Callable[[int, Tensor, float], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    route: Callable[[Tensor, Tensor, Any], Any] | None = None,
) -> Tensor:
    """Integrate from noise to data.

    Args:
        velocity_fn: (x (N, …), t (N,)) → velocity (N, …); with ``route``, (x, t, what it gave) → velocity.
        noise: x at times[0], (N, …). In a type below float32 it says what ``velocity_fn`` takes; times and the solver's state are float32 or wider.
        times: decreasing times; see :func:`time_grid`.
        solver: ``euler``, ``heun``, ``midpoint`` or ``dpmpp_2m``.
        callback: called with (evaluation, x, t) before each velocity.
        cancelled: asked before each velocity.
        route: (x, t, ``None``) → the experts' weights at the beginning of a step, and (x, t, what it gave there) → their weights at its other
            velocities: see ``routing_weights`` and ``reweighted`` of :mod:`paris_ray.diffusion.ensemble`.

    Returns:
        x at times[-1], (N, …), of the noise's type.

    Raises:
        Cancelled: ``cancelled`` said so.
        ValueError: no such solver, or times that do not go down from at most 1 to at least 0.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: {solver!r} is not one of {', '.join(SOLVERS)}")
    if len(times) < 2 or not times[0] <= 1 or not times[-1] >= 0 or any(later >= earlier for earlier, later in itertools.pairwise(times)):
        raise ValueError(f"times: {list(times)[:6]} must go down from at most 1 (noise) to at least 0 (data), two of them or more; see time_grid")
    wide = torch.promote_types(noise.dtype, torch.float32)  # steps of bfloat16 near t = 1 are 1/256
    run = SOLVERS[solver](noise.to(wide), times)
    x, t = next(run)
    evaluation = 0
    chosen: Any = None
    while True:
        if cancelled is not None and cancelled():
            raise Cancelled(f"cancelled before evaluation {evaluation} at t = {t:.3f}")
        if callback is not None:
            callback(evaluation, x, t)
        state, now = x.to(noise.dtype), torch.full((x.shape[0],), t, dtype=wide, device=x.device)
        if route is None:
            velocity = velocity_fn(state, now)
        else:
            weights = route(state, now, None if begins_step(solver, evaluation) else chosen)
            chosen = weights if begins_step(solver, evaluation) else chosen
            velocity = velocity_fn(state, now, weights)
        try:
            x, t = run.send(velocity.to(wide))
        except StopIteration as done:
            result: Tensor = done.value
            return result.to(noise.dtype)
        evaluation += 1
