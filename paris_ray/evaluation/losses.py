"""Held-out loss: how far an expert's, or the mixture's, velocity is from the flow's on rows that training did not see. Imports torch, not Ray.

The same noise at every time and for every model that is asked, so that differences between models are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paris_ray.diffusion.ensemble import Conditioning, Experts, ensemble_velocity, routing_weights
from paris_ray.diffusion.path import interpolate
from paris_ray.diffusion.routing import Routing
from paris_ray.diffusion.sampler import initial_noise
from paris_ray.evaluation.times import TIMES
from paris_ray.inference.prompts import Prompts
from paris_ray.inference.weighing import Weigher
from paris_ray.inference.weights import ParisModel

Velocity = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
"""States (n, C, H, W), times (n,), and which of the N rows these are → velocities."""

_ROWS = 64


@torch.inference_mode()
def flow_losses(velocity: Velocity, latents: NDArray[np.float32], seeds: Sequence[int], times: Sequence[float] = TIMES) -> NDArray[np.float64]:
    """Mean square of v − (ε − x_0) over the numbers of a latent, of each row at each time.

    Args:
        velocity: what is measured.
        latents: clean latents (N, C, H, W).
        seeds: of the N rows' noise.
        times: T of them.

    Returns:
        (T, N).
    """
    x0 = torch.from_numpy(np.asarray(latents, np.float32))
    noise = torch.stack([initial_noise(seed, 0, tuple(x0.shape[1:])) for seed in seeds])
    losses = np.empty((len(times), len(x0)))
    for i, time in enumerate(times):
        for start in range(0, len(x0), _ROWS):
            rows = range(start, min(start + _ROWS, len(x0)))
            clean, own = x0[start : rows.stop], noise[start : rows.stop]
            t = torch.full((len(rows),), time)
            found = velocity(interpolate(clean, own, t), t, rows).float().cpu()
            losses[i, start : rows.stop] = (found - (own - clean)).double().square().flatten(1).mean(1).numpy()
    return losses


def routed_velocity(model: ParisModel, experts: Experts, captions: Sequence[str], routing: str) -> Velocity:
    """What the mixture says, without guidance.

    Args:
        model: with the router.
        experts: the experts.
        captions: of the N rows.
        routing: as in a request, but for ``caption``, which draws an expert for a whole picture.

    Raises:
        ValueError: no such routing.
    """
    strategy = Routing.parse(routing, model.num_experts)
    if strategy.kind == "caption":
        raise ValueError(
            "routing: 'caption' draws an expert for a whole picture; a loss is of single states: give top-k, threshold, full or expert-k"
        )
    prompts, weigher, available = Prompts(model), Weigher(model), torch.tensor(experts.available())

    def velocity(x: Tensor, t: Tensor, rows: Sequence[int]) -> Tensor:
        x, t = x.to(model.device), t.to(model.device)
        cond = conditioning(model, prompts, [captions[row] for row in rows])
        logits = weigher.logits(x, t, list(cond.pooled))
        return ensemble_velocity(x, t, cond, experts, routing_weights(logits, strategy, available))

    return velocity


def conditioning(model: ParisModel, prompts: Prompts, captions: Sequence[str]) -> Conditioning:
    """Of captions, one a row, without guidance."""
    prompts.prepare(captions)
    texts = [prompts(caption) for caption in captions]
    null, n = prompts(""), len(texts)
    keys = tuple(text.digest for text in texts)
    states, pooled = [text.states for text in texts], [text.pooled for text in texts]
    return Conditioning(states, pooled, [null.states] * n, torch.ones(n), keys, (null.digest,) * n)
