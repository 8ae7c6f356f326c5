"""What is said of a model and of its experts. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel

State: TypeAlias = Literal["ready", "loading", "missing", "dead"]
"""Of an expert. ``loading``: it or its process is not there yet. ``missing``: it has no weights that can be served, or is retired. ``dead``: its
process does not answer, or its forward pass fails."""


@dataclass(frozen=True)
class ExpertState:
    """What a process says of an expert that it is meant to have; the fingerprint is that of the weights that it serves."""

    index: int
    state: State
    reason: str = ""
    fingerprint: str | None = None
    objective: str | None = None


class ExpertCard(BaseModel):
    """One expert, as ``/v1/models`` and ``/v1/experts`` tell it."""

    index: int
    objective: str
    cluster_size: int | None
    # Of the weights that are served; of one that is not, as the model's folder says.
    fingerprint: str | None
    state: State
    # Why it is in this state, where there is something to say.
    reason: str = ""
    # Rows that it has computed for this sampler: two experts that are asked for a picture at a step have one each.
    rows: int = 0


class ModelCard(BaseModel):
    """A model as the sampler holds it."""

    id: str
    created: int
    fingerprint: str | None
    # Side of the square picture in pixels.
    image_size: int
    experts: list[ExpertCard]
    # steps, guidance_scale, routing, solver of a request that does not say.
    sampling: dict[str, Any]
    # Whether the router reads the prompt, which routing "caption" needs.
    router_reads_text: bool
    attribution: str | None
    # Whether every placed expert has run a forward pass since the sampler started.
    warm: bool
    # With fewer experts there, requests are refused.
    min_experts: int = 1
    # Pictures that wait, and that are being made, with this sampler; of several, each counts for itself.
    queued: int = 0
    active: int = 0
    sampler: str = ""

    @property
    def size(self) -> str:
        return f"{self.image_size}x{self.image_size}"
