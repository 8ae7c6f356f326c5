"""What is asked of the sampling engine, and what it answers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paris_ray.diffusion.routing import Routing
from paris_ray.diffusion.sampler import SOLVERS, WHOLE_RANGE

if TYPE_CHECKING:
    from paris_ray.inference.weights import Described

MAX_STEPS = 1000
MAX_GUIDANCE = 50.0


class EngineFull(RuntimeError):
    """The queue is full; try again later."""


class EngineStopped(RuntimeError):
    """The engine was stopped before the picture was done."""


class TooDegraded(RuntimeError):
    """The experts that are missing have more say in a picture than may be lost."""


@dataclass(frozen=True)
class ImageRequest:
    """One picture. Fields that are ``None`` take the model's defaults.

    Attributes:
        prompt: what to draw; empty draws without a caption.
        negative_prompt: what guidance leads away from; empty is the empty caption.
        seed: with ``index`` decides the noise.
        index: number of the picture in its request.
        steps: solver steps, 1 … 1000.
        guidance_scale: 1 (off) … 50.
        routing: ``top-k``, ``threshold``, ``full``, ``caption`` or ``expert-k``.
        solver: ``euler`` or ``dpmpp_2m`` (one evaluation a step), ``heun`` or ``midpoint`` (two).
        client: whose request it is; waiting clients are served in turn.
        guidance_interval: lowest and highest time with guidance, 0 ≤ low < high ≤ 1 (0 is data, 1 is noise); outside it is off and costs one pass.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    index: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    routing: str | None = None
    solver: str | None = None
    client: str = ""
    guidance_interval: tuple[float, float] = WHOLE_RANGE


@dataclass(frozen=True)
class ImageResult:
    """One finished picture.

    Attributes:
        image: uint8 (H, W, 3).
        seed: as requested.
        index: as requested.
        routing: per evaluation ``{"t": float, "weights": [K floats]}``.
        degraded: experts that were masked in at least one evaluation because they were not available.
        seconds: from submission to the end.
        latent: the final latent, float32 (C, H, W).
        masked_probability: the most that the router gave, at one time, to experts that were not available.
        versions: of each expert that was asked, the versions that answered: several, in order, if it was changed meanwhile; none where experts have
            no versions.
    """

    image: NDArray[np.uint8]
    seed: int
    index: int
    routing: list[dict[str, Any]]
    degraded: list[int]
    seconds: float
    latent: NDArray[np.float32]
    masked_probability: float = 0.0
    versions: dict[int, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Preview:
    """A look at an unfinished picture: what it would be if the velocity stayed as it is.

    Attributes:
        image: uint8 (H, W, 3).
        evaluation: evaluations done.
        evaluations: evaluations in all.
        t: time of the state, 1 is noise.
    """

    image: NDArray[np.uint8]
    evaluation: int
    evaluations: int
    t: float


def validate(request: ImageRequest, model: Described) -> ImageRequest:
    """The request with the model's defaults filled in.

    Raises:
        ValueError: names field, value and rule.
    """
    names = ("steps", "guidance_scale", "routing", "solver")
    request = dataclasses.replace(request, **{name: model.defaults[name] for name in names if getattr(request, name) is None})
    for name in ("prompt", "negative_prompt", "client"):
        if not isinstance(getattr(request, name), str):
            raise ValueError(f"{name}: {getattr(request, name)!r} must be text")
    for name, low, high in (("seed", 0, 2**63 - 1), ("index", 0, 2**31 - 1), ("steps", 1, MAX_STEPS)):
        value = getattr(request, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name}: {value!r} must be a whole number from {low} to {high}")
    scale = request.guidance_scale
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 1 <= scale <= MAX_GUIDANCE:
        raise ValueError(f"guidance_scale: {scale!r} must be a number from 1 (off) to {MAX_GUIDANCE:g}")
    interval = request.guidance_interval
    pair = isinstance(interval, tuple | list) and len(interval) == 2 and all(type(end) in (int, float) for end in interval)
    if not pair or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"guidance_interval: {interval!r} must be two times, low and high, with 0 ≤ low < high ≤ 1 (0 is data, 1 is noise)")
    if request.solver not in SOLVERS:
        raise ValueError(f"solver: {request.solver!r} is not one of {', '.join(SOLVERS)}")
    if Routing.parse(str(request.routing), model.num_experts).kind == "caption" and not model.router_reads_text:
        raise ValueError("routing: 'caption' needs a router that reads text, and this model's does not; use top-2")
    return request
