"""Rows of the table that no endpoint can answer: another router, exchanged experts, the codec alone. Imports torch, not Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future

from torch import Tensor

from paris_ray.diffusion.ensemble import ExpertCall, Experts
from paris_ray.evaluation.protocol import Question
from paris_ray.inference.engine import Engine
from paris_ray.inference.request import ImageRequest, ImageResult
from paris_ray.inference.strict import load_router
from paris_ray.inference.weights import ParisModel
from paris_ray.storage import Folder


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
