"""Pictures in the engine: those that wait, and those on their way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paris_ray.diffusion.ensemble import Conditioning
from paris_ray.diffusion.routing import Routing
from paris_ray.diffusion.sampler import Solver, begins_step, evaluations, guidance_at
from paris_ray.inference.prompts import EncodedPrompt
from paris_ray.inference.request import ImageRequest, ImageResult, Preview


@dataclass(frozen=True, eq=False)
class Ticket:
    """A picture that waits: its request with every default filled in, and where its result goes."""

    request: ImageRequest
    steps: int
    guidance: float
    solver: str
    routing: Routing
    future: Future[ImageResult]
    noise: Tensor | None
    preview: Callable[[Preview], None] | None
    preview_every: int
    submitted: float

    @property
    def evaluations(self) -> int:
        """Velocities from noise to picture."""
        return evaluations(self.solver, self.steps)


@dataclass(eq=False)
class Row:
    """A picture on its way: its state x at time t, and the experts' weights (K,) that it holds, on the CPU."""

    ticket: Ticket
    text: EncodedPrompt
    null: EncodedPrompt
    solver: Solver
    x: Tensor
    t: float
    weights: Tensor | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    masked: set[int] = field(default_factory=set)
    masked_probability: float = 0.0
    versions: dict[int, list[str]] = field(default_factory=dict)
    setbacks: int = 0

    def undecided(self, missing: Sequence[int]) -> bool:
        """Whether its experts are to be chosen: at the beginning of a step or, with one expert to the end, of the picture; or when one has gone."""
        if self.weights is None or any(bool(self.weights[k] != 0) for k in missing):
            return True
        return not self.ticket.routing.once_per_picture and begins_step(self.ticket.solver, len(self.history))

    def note(self, weights: Tensor, versions: Mapping[int, Sequence[str]]) -> None:
        """Keep which versions of the experts have answered it, each once, in order."""
        for k in weights.nonzero().flatten().tolist() if versions else ():
            theirs = self.versions.setdefault(k, [])
            theirs += [version for version in versions.get(k, ()) if version not in theirs]

    @property
    def several(self) -> bool:
        """Whether it asks more than one expert, whose weights follow its state within a step."""
        return self.weights is not None and int((self.weights != 0).sum()) > 1

    @property
    def looked_at(self) -> bool:
        """Whether a preview is due."""
        done = len(self.history)
        return self.ticket.preview is not None and done % self.ticket.preview_every == 0 and done < self.ticket.evaluations


def conditioning(rows: Sequence[Row]) -> Conditioning:
    """What rows are conditioned on at their times."""
    guidance = [guidance_at(row.t, row.ticket.guidance, row.ticket.request.guidance_interval) for row in rows]
    return Conditioning(
        [row.text.states for row in rows],
        [row.text.pooled for row in rows],
        [row.null.states for row in rows],
        torch.tensor(guidance),
        tuple(row.text.digest for row in rows),
        tuple(row.null.digest for row in rows),
    )


def pick(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of a tensor, chosen on the CPU: nothing waits for the tensor's device."""
    return x if len(rows) == len(x) else torch.stack([x[n] for n in rows])
