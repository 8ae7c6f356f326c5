"""Where the experts of a served model run. Imports nothing heavy."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from paris_ray.strict import Strict


class ServeGroup(Strict):
    """Experts that share a process, and what that asks of its node."""

    experts: Annotated[tuple[int, ...], Field(min_length=1)]
    # A number; or the least and the most, between which Serve chooses by the rows that are on their way.
    replicas: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 1
    # Of each replica; null is the application's.
    cpus: Annotated[float, Field(ge=0)] | None = None
    gpus: Annotated[float, Field(ge=0)] | None = None
    # Custom resources, and labels that the node must have.
    resources: dict[str, float] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)

    @property
    def most_replicas(self) -> int:
        return self.replicas if isinstance(self.replicas, int) else self.replicas[1]

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if isinstance(self.replicas, tuple) and self.replicas[0] > self.replicas[1]:
            raise ValueError(f"replicas: {list(self.replicas)} must be the least and the most; write them in that order")
        return self


Placement: TypeAlias = Literal["together", "apart"] | tuple[Annotated[tuple[int, ...], Field(min_length=1)] | ServeGroup, ...]


def serve_groups(placement: Placement, num_experts: int) -> list[ServeGroup]:
    """The groups of a placement; none when all experts are together with the sampler.

    Raises:
        ValueError: it names an expert twice, or one that does not exist.
    """
    if placement == "together":
        return []
    if placement == "apart":
        return [ServeGroup(experts=(k,)) for k in range(num_experts)]
    groups = [group if isinstance(group, ServeGroup) else ServeGroup(experts=group) for group in placement]
    named = [k for group in groups for k in group.experts]
    if len(set(named)) != len(named) or any(not 0 <= k < num_experts for k in named):
        raise ValueError(f"placement: {[list(group.experts) for group in groups]} must name experts of 0…{num_experts - 1}, none twice")
    return groups
