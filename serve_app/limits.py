"""Limits of the server, as whoever runs it sets them."""

from __future__ import annotations

import math
from typing import Annotated, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field


class Limits(BaseModel):
    """What one request may ask for, and one client."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_images_per_request: Annotated[int, Field(ge=1)] = 10
    max_steps: Annotated[int, Field(ge=1)] = 200
    # Evaluations of the velocity over all pictures of a request: n × steps, twice that with heun or midpoint. One picture may always have max_steps.
    max_image_steps: Annotated[int, Field(ge=1)] = 1000
    max_prompt_chars: Annotated[int, Field(ge=1)] = 4000
    # Of each API key, or of each address where there are no keys; none is no limit. Unused pictures add up to a minute's worth.
    images_per_minute: Annotated[int, Field(ge=1)] | None = None
    requests_at_once: Annotated[int, Field(ge=1)] | None = None

    @pydantic.model_validator(mode="after")
    def _one_request_a_minute(self) -> Self:
        if self.images_per_minute is not None and self.images_per_minute < self.max_images_per_request:
            raise ValueError(
                f"images_per_minute {self.images_per_minute} is less than max_images_per_request {self.max_images_per_request}, so some requests "
                "would never be let through; raise the one or lower the other"
            )
        return self


def divided(limits: Limits, ingresses: int) -> Limits:
    """The limits of one of so many ingress processes, each of which counts for itself: its part of what a client may have, rounded up.

    A client whose requests are spread evenly has what the limits say; one that always meets the same process has that one's part.

    Raises:
        ValueError: a part is so small that some requests would never be let through.
    """
    parts = {name: math.ceil(whole / ingresses) for name in ("images_per_minute", "requests_at_once") if (whole := getattr(limits, name)) is not None}
    return Limits(**{**limits.model_dump(), **parts})
