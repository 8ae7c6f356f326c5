"""Paths between data and noise, what models predict on them, and conversions into one velocity.

Time, said once for the whole project: t ∈ [0, 1], **t = 0 is data, t = 1 is noise**. On the linear path x_t = (1−t)·x_0 + t·ε, and the velocity is
v = dx_t/dt = ε − x_0. All functions take t of shape (N,) and tensors of shape (N, …).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

ALPHA_MIN = 0.01
X0_LIMIT = 20.0
"""Guards of the ε → x̂_0 conversion (arXiv 2603.06741): α ≥ 0.01, |x̂_0| ≤ 20."""

PIECE = 64
"""Times that a schedule is asked for at once on a CPU, a whole number of its vectors."""


def expand(t: Tensor, like: Tensor) -> Tensor:
    """(N,) → (N, 1, …) with as many dimensions as ``like``."""
    return t.view(-1, *[1] * (like.dim() - 1))


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The linear path: x_t = (1−t)·x_0 + t·ε."""
    t = expand(t, x0)
    return (1 - t) * x0 + t * noise


def x0_from_velocity(x: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """x_0 = x_t − t·v."""
    return x - expand(t, x) * v


def noise_from_velocity(x: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """ε = x_t + (1−t)·v."""
    return x + (1 - expand(t, x)) * v


def velocity_from_x0(x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """v = (x_t − x_0)/t, for t > 0."""
    return (x - x0) / expand(t, x)


def velocity_from_noise(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """v = (ε − x_t)/(1−t), for t < 1."""
    return (noise - x) / (1 - expand(t, x))


# -- DDPM schedules -----------------------------------------------------------------------------------------------------


class NoiseSchedule(Protocol):
    """A variance-preserving schedule in continuous time n ∈ [0, 1]: x = α(n)·x_0 + σ(n)·ε, α² + σ² = 1."""

    def alpha_sigma(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at n."""
        ...

    def match(self, t: Tensor) -> Tensor:
        """The n whose signal-to-noise ratio α/σ is (1−t)/t, clamped to the schedule's range."""
        ...


def flow_time(schedule: NoiseSchedule, n: Tensor) -> Tensor:
    """The t whose signal-to-noise ratio (1−t)/t on the linear path is the schedule's α/σ at n: the inverse of ``match``."""
    alpha, sigma = schedule.alpha_sigma(n)
    return sigma / (alpha + sigma)


class CosineSchedule:
    """α = cos(πn/2), σ = sin(πn/2) (Nichol & Dhariwal, arXiv 2102.09672, without offset)."""

    def alpha_sigma(self, n: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(math.pi / 2 * n), torch.sin(math.pi / 2 * n)

    def match(self, t: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan2(t, 1 - t)


class LinearSchedule:
    """DDPM's linear β from 0.1 to 20 in continuous time (Ho et al., arXiv 2006.11239; Song et al., arXiv 2011.13456, eq. 32).

    It ends at α(1) = 0.0066, that is at t ≈ 0.9935 on the linear path.
    """

    beta_min, beta_max = 0.1, 20.0

    def alpha_sigma(self, n: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = -0.25 * n**2 * (self.beta_max - self.beta_min) - 0.5 * n * self.beta_min
        return torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))

    def match(self, t: Tensor) -> Tensor:
        # −log α = ½·log(1 + (t/(1−t))²); n is the positive root of ¼Δβ·n² + ½β_min·n = −log α, in the form without cancellation.
        t = t.clamp(max=0.999)  # past the schedule's end n is 1 anyway, and at t = 1 the ratio is infinite
        minus_log_alpha = 0.5 * torch.log1p((t / (1 - t)) ** 2)
        a, b = 0.25 * (self.beta_max - self.beta_min), 0.5 * self.beta_min
        n = 2 * minus_log_alpha / (b + torch.sqrt(b * b + 4 * a * minus_log_alpha))
        return n.clamp(0.0, 1.0)


SCHEDULES: dict[str, type[CosineSchedule] | type[LinearSchedule]] = {"cosine": CosineSchedule, "linear": LinearSchedule}


# -- objectives ---------------------------------------------------------------------------------------------------------


class Objective(Protocol):
    """What an expert learns, and how its output becomes a velocity on the linear path."""

    name: str

    def training_pair(self, x0: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input, time and target of one training step, from data, noise and a time drawn in [0, 1]."""
        ...

    def model_input(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """State and time to show the model for a state (x_t, t) of the linear path."""
        ...

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The model's output as velocity at (x_t, t) of the linear path."""
        ...


class Flow:
    """Flow matching (arXiv 2510.03434, 2501.05450): predict v = ε − x_0 on the linear path."""

    name = "flow"

    def training_pair(self, x0: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return interpolate(x0, noise, u), u, noise - x0

    def model_input(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, t

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return output


class Ddpm:
    """Noise prediction on a variance-preserving schedule, matched to the linear path by signal-to-noise ratio.

    arXiv 2603.06741 gives x̂_0 = (x − σ·ε̂)/α with α ≥ 0.01 and |x̂_0| ≤ 20. How a state of the linear path is matched to the schedule is not
    published; ours is exact: the schedule's state with the same ratio is x_t / √((1−t)² + t²), finite everywhere. The velocity is taken from
    x̂_0 for t > ½ and from ε̂ for t ≤ ½, where each divides by a number that is not small. Computed in float32 or wider, because errors in ε̂
    are amplified near t = 1, where sampling starts.

    The true ε gives the true velocity to t = 0.99, where α is 0.0101. Beyond, α ≥ 0.01 binds, and the velocity is the published rule's: an error δ
    in ε̂ becomes at most 100·δ in x̂_0, at the price of an x̂_0 that goes to 0 as t goes to 1.
    """

    name = "ddpm"

    def __init__(self, schedule: Literal["cosine", "linear"] = "cosine"):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: {schedule!r} is not one of {', '.join(SCHEDULES)}")
        self.schedule_name = schedule
        self.schedule: NoiseSchedule = SCHEDULES[schedule]()

    def training_pair(self, x0: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = self.schedule.alpha_sigma(u)
        return expand(alpha, x0) * x0 + expand(sigma, x0) * noise, u, noise

    def model_input(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        n, _, _ = self._matched(t)
        return x / expand(torch.sqrt((1 - t) ** 2 + t**2), x), n

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        noise, x, t = output.to(wide), x.to(wide), t.to(wide)
        state = x / expand(torch.sqrt((1 - t) ** 2 + t**2), x)
        _, alpha, sigma = self._matched(t)
        x0 = ((state - expand(sigma, x) * noise) / expand(alpha.clamp_min(ALPHA_MIN), x)).clamp(-X0_LIMIT, X0_LIMIT)
        late = t > 0.5
        # The branch not taken must not divide by zero.
        from_x0 = velocity_from_x0(x, torch.where(late, t, 1.0), x0)
        from_noise = velocity_from_noise(x, torch.where(late, 0.0, t), noise)
        return torch.where(expand(late, x), from_x0, from_noise)

    def _matched(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The schedule's time for each of some times, and α and σ there: three of (N,).

        On a CPU in pieces of one size: torch takes other code for atan2, log1p … of a few numbers than of many, and its last bit differs.
        """
        count = t.shape[0]
        pieces = F.pad(t, (0, -count % PIECE)).split(PIECE) if t.device.type == "cpu" else (t,)
        times = [self.schedule.match(piece) for piece in pieces]
        found = [torch.stack([n, *self.schedule.alpha_sigma(n)]) for n in times]
        n, alpha, sigma = torch.cat(found, dim=1)[:, :count]
        return n, alpha, sigma


def as_velocity(module: Callable[..., Tensor], objective: Objective, dtype: torch.dtype | None = None) -> Callable[..., Tensor]:
    """An expert, whatever it predicts, as a velocity on the linear path.

    Args:
        module: (x, t, …) → output.
        objective: what the output means.
        dtype: of the latents that the module takes; ``None`` leaves them as they are.

    Returns:
        (x (N, C, H, W), t (N,), …) → velocity (N, C, H, W), float32 or wider; what else it is given, text or its keys and values, goes to the module.
    """

    def velocity(x: Tensor, t: Tensor, *args: Any, **options: Any) -> Tensor:
        state, time = objective.model_input(x, t)
        output = module(state if dtype is None else state.to(dtype), time, *args, **options)
        return objective.velocity(output.to(torch.promote_types(output.dtype, torch.float32)), x, t)

    return velocity


def objective(name: str, schedule: str = "cosine") -> Objective:
    """An objective by name: ``flow`` or ``ddpm``."""
    if name == "flow":
        return Flow()
    if name == "ddpm":
        return Ddpm(schedule)  # type: ignore[arg-type]
    raise ValueError(f"objective: {name!r} is not one of flow, ddpm")


def training_times(uniform: Tensor, kind: str, mean: float = 0.0) -> Tensor:
    """Times for training from uniform draws in [0, 1): as they are, or logit-normal (arXiv 2403.03206) of location ``mean`` and scale 1."""
    if kind == "uniform":
        return uniform
    if kind == "logit_normal":
        tiny = torch.finfo(uniform.dtype).eps
        return torch.sigmoid(mean + torch.special.ndtri(uniform.clamp(tiny, 1 - tiny)))
    raise ValueError(f"timesteps: {kind!r} is not one of uniform, logit_normal")
