"""Distillation: one dense model that learns what a mixture of experts says (Decentralized Diffusion Models, arXiv 2501.05450)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from paris_ray import stages
from paris_ray.config import ConfigError, RunConfig
from paris_ray.data.encoders import pool
from paris_ray.diffusion.ensemble import Conditioning, ExpertCall, ensemble_velocity, routing_weights
from paris_ray.diffusion.path import as_velocity
from paris_ray.diffusion.routing import Routing
from paris_ray.inference.strict import load_expert, load_router
from paris_ray.inference.weights import read_facts
from paris_ray.manifest import Stage, require
from paris_ray.storage import Folder
from paris_ray.training.expert_task import ExpertTask
from paris_ray.training.feed import Batch
from paris_ray.training.shard import Rows


class Teacher:
    """The mixture of an assembled model, by its own routing and without guidance; implements :class:`paris_ray.diffusion.ensemble.Experts`.

    Networks alone, without the engine's cache of texts: a caption of training comes back after a whole epoch.

    Args:
        model: folder of the model.
        device: where it is asked.

    Raises:
        ConfigError: its routing is decided once a picture, not at a state.
    """

    versions: Mapping[int, Sequence[str]] = {}

    def __init__(self, model: Folder, device: torch.device):
        facts = read_facts(model)
        side, self.num_experts = facts.latent_shape[-1], facts.num_experts
        self.info, self.routing = facts.info, Routing.parse(facts.defaults["routing"], facts.num_experts)
        if self.routing.kind == "caption":
            raise ConfigError(
                f"{model.uri}: its sampling.routing is caption, which draws an expert for a whole picture; a student asks single states"
            )
        self.router = load_router(facts.folder / "router", side, device=str(device)).float()
        self.experts = [load_expert(facts.folder / f"expert_{k}", side, device=str(device)) for k in range(self.num_experts)]

    def available(self) -> list[bool]:
        """All of them."""
        return [True] * self.num_experts

    def velocities(self, calls: Sequence[ExpertCall]) -> list[Tensor]:
        """Of each call (n, C, H, W); noise predictions are made in float32, as where pictures are drawn."""
        found = []
        for call in calls:
            module, objective = self.experts[call.expert]
            kind = call.x.device.type
            with torch.autocast(kind, torch.bfloat16, enabled=torch.is_autocast_enabled(kind) and objective.name == "flow"):
                found.append(as_velocity(module, objective)(call.x, call.t, call.cond.text))
        return found

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        """Velocity (N, C, H, W) of states (N, C, H, W) at times (N,), under text states (N, S, D) and pooled texts (N, P)."""
        logits = self.router(x, t, None if self.router.text_embed_dim is None else pooled)  # (N, K)
        weights = routing_weights(logits.float().cpu(), self.routing, torch.tensor(self.available()))
        names = ("",) * len(x)
        return ensemble_velocity(x, t, Conditioning(text, pooled, text, torch.ones(len(x)), names, names), self, weights)


class StudentTask(ExpertTask):
    """An expert that learns its teacher's velocity in the place of the flow's.

    It asks at the states, times and captions of ordinary training, and where a caption was dropped for the empty one, so it can be guided as others
    are. Its losses, on validation rows as well, are distances to the teacher, not to the data.

    Args:
        config: the run's config.
        k: which expert.
        device: where the model is, and the teacher.
        rank: which of the expert's workers this is.
        teacher: folder of an assembled model with the run's own encoders.

    Raises:
        ConfigError: the teacher reads other latents or texts, or the student predicts something else than a velocity.
    """

    def __init__(self, config: RunConfig, k: int, device: torch.device, rank: int, teacher: Folder):
        super().__init__(config, k, device, rank)
        if self.spec.objective != "flow":
            raise ConfigError(f"experts.{k}.objective is {self.spec.objective}; a student learns a velocity: set it to flow")
        self.teacher = Teacher(teacher, device)
        for name in ("codec", "text"):
            if self.teacher.info[name] != self.encoders.meta[name]:
                raise ConfigError(
                    f"{self.stage}: its teacher {teacher.uri} has another {name} than {self.encoders.folder.uri}; take one of this corpus"
                )

    def _batch(self, data: Rows, rows: Tensor, noise: Tensor, time: Tensor, dropped: Tensor) -> Batch:
        return {**super()._batch(data, rows, noise, time, dropped), "text_len": data.text_len[rows]}

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean squared distance of each sample to the teacher's velocity: (n,), and its time: (n,)."""
        x, time, _ = self.objective.training_pair(batch["latent"].float(), batch["noise"], batch["time"])
        text = self.text(batch)
        length = torch.where(batch["dropped"], self.encoders.null_length, batch["text_len"])
        target = self.teacher(x, time, text, pool(text, length, self.encoders.meta["text"]["pooling"]))
        return (model(x, time, text).float() - target).square().flatten(1).mean(1), time


def student_stage(config: RunConfig, name: str, teacher: Folder) -> Stage:
    """The stage of a student. Its teacher is a parent, so what another one has taught is stale. Raises FileNotFoundError: a parent is missing."""
    own = stages.stage(config, name)
    return replace(own, parents={**own.parents, "teacher": require(teacher, "assemble")["fingerprint"]})
