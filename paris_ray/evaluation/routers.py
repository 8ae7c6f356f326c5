"""Routers on rows that training did not see: how often the first choice is right, whether probabilities mean what they say. No Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from paris_ray.diffusion.path import interpolate
from paris_ray.diffusion.sampler import initial_noise
from paris_ray.evaluation.metrics import Share, calibration_error
from paris_ray.inference.prompts import Prompts
from paris_ray.inference.weighing import Weigher
from paris_ray.inference.weights import ParisModel
from paris_ray.models import Router

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
"""Where routers are measured."""

_ROWS = 64


@dataclasses.dataclass(frozen=True)
class RouterAt:
    """A router, or what knows nothing but the sizes of the clusters, at one time.

    Attributes:
        accuracy: how often the first choice is the row's cluster.
        calibration: expected calibration error.
        log_loss: mean of −log p(the row's cluster), in nats.
    """

    accuracy: Share
    calibration: float
    log_loss: float

    def as_json(self) -> dict[str, Any]:
        return {**self.accuracy.as_json(), "calibration": self.calibration, "log_loss": self.log_loss}


def judged(log_probabilities: NDArray[np.floating], clusters: Sequence[int]) -> RouterAt:
    """A classifier by its log-probabilities (N, K) and the true clusters (N,)."""
    wide, own = np.asarray(log_probabilities, np.float64), np.asarray(clusters)
    named = wide.argmax(1)
    right = named == own
    confidence = np.exp(wide[np.arange(len(own)), named])
    return RouterAt(Share(int(right.sum()), len(own)), calibration_error(confidence, right), float(-wide[np.arange(len(own)), own].mean()))


def prior(trained: Sequence[int], clusters: Sequence[int], num_experts: int) -> RouterAt:
    """What a router must beat: the clusters' shares of the training rows, whatever is shown.

    Args:
        trained: clusters of the training rows.
        clusters: of the rows to judge.
        num_experts: K.
    """
    counts = np.bincount(np.asarray(trained), minlength=num_experts)
    # A cluster without a training row gets the share of half a one: its log is finite.
    shares = np.maximum(counts, 0.5) / np.maximum(counts, 0.5).sum()
    return judged(np.broadcast_to(np.log(shares), (len(clusters), num_experts)), clusters)


@torch.inference_mode()
def router_by_time(
    model: ParisModel, router: Router, latents: NDArray[np.float32], captions: Sequence[str], clusters: Sequence[int], seeds: Sequence[int]
) -> list[RouterAt]:
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
