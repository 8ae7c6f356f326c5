"""Limits of the server, as whoever runs it sets them."""

from __future__ import annotations

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
