"""Rows of the table that no endpoint can answer: another router, exchanged experts, the codec alone. Imports torch, not Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paris_ray.diffusion.ensemble import ExpertCall, Experts
from paris_ray.diffusion.path import interpolate
from paris_ray.diffusion.sampler import initial_noise
from paris_ray.evaluation.metrics import Share
from paris_ray.evaluation.protocol import Question
from paris_ray.inference.engine import Engine
from paris_ray.inference.prompts import Prompts
from paris_ray.inference.request import ImageRequest, ImageResult
from paris_ray.inference.strict import load_router
from paris_ray.inference.weights import ParisModel
from paris_ray.models import Router
from paris_ray.storage import Folder

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
"""Where the routers' accuracy is measured."""


class Exchanged:
    """Experts under each other's names: who is asked for k gets k + 1. The router's choice is then always wrong; the table must collapse.

    Args:
        experts: the true ones.
    """

    def __init__(self, experts: Experts):
        self.experts, self.num_experts = experts, experts.num_experts

    @property
    def versions(self) -> dict[int, Sequence[str]]:
        """Of the neighbours."""
        return {(k - 1) % self.num_experts: theirs for k, theirs in self.experts.versions.items()}

    def available(self) -> list[bool]:
        """Which names can be called now."""
        there = self.experts.available()
        return [there[(k + 1) % self.num_experts] for k in range(self.num_experts)]

    def velocities(self, calls: Sequence[ExpertCall]) -> list[Tensor]:
        """Velocities of the neighbours of those asked."""
        return self.experts.velocities([dataclasses.replace(call, expert=(call.expert + 1) % self.num_experts) for call in calls])


def draw(model: ParisModel, experts: Experts, questions: Sequence[Question], routing: str) -> list[ImageResult]:
    """Pictures from the engine that serving runs, in this process: the noise of a question is the same as over HTTP."""
    engine = Engine(model, experts, max_queue=max(1, len(questions)))
    futures: list[Future[ImageResult]] = [engine.submit(ImageRequest(one.caption, seed=one.seed, routing=routing)) for one in questions]
    engine.run_until_idle()
    return [future.result() for future in futures]


def with_router(model: ParisModel, export: Folder) -> ParisModel:
    """The model with another router in its place, such as the paper's text-blind one from ``RUN/control_router/export``."""
    return dataclasses.replace(model, router=load_router(export, model.latent_shape[1]).float().to(model.device))


@torch.inference_mode()
def router_accuracy(
    model: ParisModel, router: Router, latents: NDArray[np.float32], captions: Sequence[str], clusters: Sequence[int], seeds: Sequence[int]
) -> list[Share]:
    """How often a router's first choice is the row's cluster, at each of :data:`TIMES`.

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
    prompts = Prompts(model)
    pooled = torch.stack([prompts(caption).pooled for caption in captions]) if router.text_embed_dim is not None else None
    right = []
    for t in TIMES:
        times = torch.full((len(x0),), t)
        logits = router(interpolate(x0, noise, times).to(model.device), times.to(model.device), pooled)
        right.append(Share(int((logits.argmax(1).cpu() == torch.tensor(list(clusters))).sum()), len(x0)))
    return right
