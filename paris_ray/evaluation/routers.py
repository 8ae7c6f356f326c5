"""Routers on rows that training did not see: how often the first choice is right, whether probabilities mean what they say. No Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from paris_ray.diffusion.path import interpolate
from paris_ray.diffusion.sampler import initial_noise
from paris_ray.evaluation.classifiers import ClassifierAt, judged
from paris_ray.inference.prompts import Prompts
from paris_ray.inference.weighing import Weigher
from paris_ray.inference.weights import ParisModel
from paris_ray.models import Router

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
"""Where routers are measured."""

_ROWS = 64


@torch.inference_mode()
def router_by_time(
    model: ParisModel, router: Router, latents: NDArray[np.float32], captions: Sequence[str], clusters: Sequence[int], seeds: Sequence[int]
) -> list[ClassifierAt]:
    """A router at each of :data:`TIMES`.

    Args:
        model: encodes the captions.
        router: the router, reading text or not.
        latents: clean latents (N, C, H, W).
        captions: of the N rows.
        clusters: of the N rows.
        seeds: of the N rows' noise; the same noise at all times.
    """
    x0 = torch.from_numpy(latents)
    noise = torch.stack([initial_noise(seed, 0, tuple(x0.shape[1:])) for seed in seeds])
    asked = dataclasses.replace(model, router=router)
    weigher, prompts, found = Weigher(asked), Prompts(model), []
    for t in TIMES:
        logits = []
        for start in range(0, len(x0), _ROWS):
            rows = slice(start, start + _ROWS)
            times = torch.full((len(x0[rows]),), t)
            pooled = [prompts(caption).pooled for caption in captions[rows]] if asked.router_reads_text else []
            logits.append(weigher.logits(interpolate(x0[rows], noise[rows], times).to(model.device), times.to(model.device), pooled))
        found.append(judged(torch.cat(logits).log_softmax(1).numpy(), clusters))
    return found
