"""What the ingress and the sampler say to each other: jobs, and what becomes of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Job:
    """A request with nothing left open: what the API hands to the sampler."""

    prompt: str
    negative_prompt: str
    n: int
    seed: int
    index: int
    steps: int
    guidance_scale: float
    routing: str
    solver: str
    # Whose job it is; waiting clients are served in turn.
    client: str = ""
    # Lowest and highest time with guidance.
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    # Of each picture, before it is done.
    previews: int = 0


@dataclass(frozen=True)
class Picture:
    """One picture as the sampler hands it over.

    Attributes:
        pixels: uint8 (H, W, 3).
        index: its index within the seed.
        times: the times at which velocities were asked for, E of them.
        weights: the experts' weights at these times, float32 (E, K).
        masked_probability: the most that the router gave, at one time, to experts that were not available.
        versions: fingerprints of the experts that it asked, by expert; several, in order, of one whose weights were exchanged meanwhile.
    """

    pixels: NDArray[np.uint8]
    index: int
    times: tuple[float, ...]
    weights: NDArray[np.float32]
    masked_probability: float = 0.0
    versions: dict[int, list[str]] = field(default_factory=dict)

    @property
    def changed(self) -> list[int]:
        """Experts whose weights were exchanged while it was made."""
        return sorted(k for k, versions in self.versions.items() if len(versions) > 1)

    def routing(self) -> list[dict[str, Any]]:
        """Which expert did what, as JSON: five digits of each weight, so that only who was not asked has 0."""
        return [{"t": round(t, 6), "weights": [float(f"{w:.5g}") for w in row]} for t, row in zip(self.times, self.weights.tolist(), strict=True)]


@dataclass(frozen=True)
class Queued:
    """The first event of a job: all its pictures have a place in the queue. Comes again when fewer pictures are before its first one."""

    ahead: int = 0


@dataclass(frozen=True)
class Glimpse:
    """A preview: what the picture would be if the velocity stayed as it is.

    Attributes:
        pixels: uint8 (H, W, 3).
        index: of the picture, within the seed.
        number: of the preview, from 0.
    """

    pixels: NDArray[np.uint8]
    index: int
    number: int


@dataclass(frozen=True)
class Finished:
    """A picture is done: with the experts that were masked meanwhile, and the seconds from submission."""

    picture: Picture
    degraded: tuple[int, ...]
    seconds: float


Event: TypeAlias = Queued | Glimpse | Finished


@dataclass(frozen=True)
class Outcome:
    """A finished job.

    Attributes:
        pictures: in the order of their indices.
        degraded: experts that were masked while the job ran.
        timings: seconds, by phase.
    """

    pictures: tuple[Picture, ...]
    degraded: tuple[int, ...]
    timings: dict[str, float]


def outcome(done: Sequence[Finished]) -> Outcome:
    """A finished job from what was told of its pictures."""
    return Outcome(
        tuple(sorted((event.picture for event in done), key=lambda picture: picture.index)),
        tuple(sorted({k for event in done for k in event.degraded})),
        {"sampler": round(max(event.seconds for event in done), 4)},
    )
