"""Many experts, one velocity: u_t(x) = Σ_k p(k | x, t) · u_t^k(x)  (arXiv 2510.03434, 2501.05450).

The only code that knows that experts are many. Exact for any weights: the marginal flow is linear in the data distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from paris_ray import rng
from paris_ray.diffusion.path import expand
from paris_ray.diffusion.routing import Routing

Rows: TypeAlias = "Tensor | Sequence[Any]"
"""Something of each row: a tensor (N, …) where the latents are, or a sequence of N things, which are picked without copying them."""


@dataclass(frozen=True)
class Conditioning:
    """What rows are conditioned on. What is one number a row is on the CPU, wherever the latents are: it decides what is computed.

    Attributes:
        text: text states of each row, (N, S, D) or N of (S, D).
        pooled: pooled text of each row, (N, P) or N of (P,).
        null_text: states of the empty caption, or of the negative prompt, of each row, as ``text``.
        guidance: guidance scale per row, (N,) on the CPU; 1 is off and costs one pass.
        text_keys: a name of each row's text, so that experts may cache what they computed from it.
        null_keys: a name of each row's null text.
    """

    text: Rows
    pooled: Rows
    null_text: Rows
    guidance: Tensor
    text_keys: tuple[str, ...]
    null_keys: tuple[str, ...]

    def take(self, rows: Sequence[int], index: Tensor) -> Conditioning:
        """Some rows; ``index`` says the same as ``rows``, where the latents are."""
        text, pooled, null_text = (take(one, rows, index) for one in (self.text, self.pooled, self.null_text))
        text_keys, null_keys = (tuple(keys[i] for i in rows) for keys in (self.text_keys, self.null_keys))
        return Conditioning(text, pooled, null_text, self.guidance[list(rows)], text_keys, null_keys)

    def __len__(self) -> int:
        return len(self.text_keys)


def take(things: Rows, rows: Sequence[int], index: Tensor) -> Rows:
    """Some rows of a tensor, or of a sequence."""
    return things[index] if isinstance(things, Tensor) else [things[i] for i in rows]


def upload(numbers: Tensor, device: torch.device) -> Tensor:
    """A small tensor on the device; from the CPU without waiting for the device: from pinned memory, in the order of its work."""
    if device.type == "cuda" and numbers.device.type == "cpu":
        return numbers.pin_memory().to(device, non_blocking=True)
    return numbers.to(device)


@dataclass(frozen=True)
class ExpertCall:
    """Rows for one expert: latents (n, C, H, W), times (n,) and their conditioning."""

    expert: int
    x: Tensor
    t: Tensor
    cond: Conditioning


class Experts(Protocol):
    """The experts, wherever they live."""

    num_experts: int

    @property
    def versions(self) -> Mapping[int, Sequence[str]]:
        """What the weights are called that answered last, by expert; nothing of those that have no name."""
        ...

    def available(self) -> list[bool]:
        """Which experts can be called now."""
        ...

    def velocities(self, calls: Sequence[ExpertCall]) -> list[Tensor]:
        """Guided velocities, one tensor (n, C, H, W) per call, in the order of the calls."""
        ...


# -- routing ------------------------------------------------------------------------------------------------------------

THRESHOLD = 0.1
"""``threshold`` keeps the experts with at least this probability, and always the largest; no source states a rule, this one is ours."""


def routing_weights(logits: Tensor, routing: Routing, available: Tensor, experts: Sequence[int] | None = None) -> Tensor:
    """Weights of the experts from the router's logits.

    A missing expert is masked and the rest renormalised *before* the strategy chooses.

    Args:
        logits: (N, K).
        routing: the strategy.
        available: (K,) bool.
        experts: the expert of each row, for a strategy that gives a picture one to its end: for ``caption`` as :func:`draw_experts` drew it, for
            ``oracle`` the cluster of the row's caption; ``expert-k`` says it itself.

    Returns:
        (N, K), rows sum to 1, float32 or wider.

    Raises:
        ValueError: no expert is available, or not the one that a row must have; or the strategy is not decided by logits alone.
    """
    if not bool(available.any()):
        raise ValueError("no expert is available")
    if routing.once_per_picture:
        experts = [routing.k] * len(logits) if routing.kind == "expert" else experts
        if experts is None:
            raise ValueError(f"routing {routing} is decided once per picture, not from one step's logits; give the experts decided on")
        return one_expert(experts, available)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    p = torch.softmax(wide.masked_fill(~available, -torch.inf), dim=-1)  # (N, K)
    if routing.kind == "full":
        return p
    if routing.kind == "top":
        k = min(routing.k, int(available.sum()))
        # Stable sort: ties go to the lower index, on every device.
        order = torch.sort(p, dim=-1, descending=True, stable=True).indices[:, :k]
        kept = torch.zeros_like(p).scatter(1, order, p.gather(1, order))
    elif routing.kind == "threshold":
        kept = torch.where((p >= THRESHOLD) | (p >= p.amax(-1, keepdim=True)), p, 0.0)
    else:
        raise ValueError(f"routing: {routing.kind!r} is not one of top, threshold, full, caption, expert, oracle")
    return kept / kept.sum(-1, keepdim=True)


def reweighted(logits: Tensor, chosen: Tensor) -> Tensor:
    """Weights at a later velocity of a step: of the experts that the step has chosen, from the logits there. Solvers keep their order by it.

    Args:
        logits: (N, K).
        chosen: weights at the step's beginning, (N, K); zero is not chosen.

    Returns:
        (N, K), rows sum to 1, float32 or wider.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.softmax(wide.masked_fill(chosen == 0, -torch.inf), dim=-1)


def one_expert(experts: Sequence[int], available: Tensor) -> Tensor:
    """Weights of rows that have one expert each: N indices → (N, K) float32. Raises ValueError of one that is not there."""
    weights = torch.zeros(len(experts), len(available))
    for row, k in enumerate(experts):
        if not 0 <= k < len(available) or not bool(available[k]):
            there = ", ".join(str(i) for i in available.nonzero().flatten().tolist()) or "none"
            raise ValueError(f"expert {k} is not available, and the routing of row {row} allows no other; available: {there}")
        weights[row, k] = 1.0
    return weights


def draw_experts(p: Tensor, keys: Sequence[int]) -> list[int]:
    """``caption``: one expert a row, drawn from p(k | caption), to be kept for the whole trajectory.

    Exact for perfect experts: p(x | c) = Σ_k p(k | c) · p(x | k, c).

    Args:
        p: probabilities (N, K) at t = 1, where the state says nothing; rows need not sum to 1.
        keys: what the draw of each row is a function of, beside p: ``rng.key(seed, index)``.
    """
    drawn = []
    for row, key in zip(p.double().cpu().numpy(), keys, strict=True):
        cumulative = np.cumsum(row)
        u = rng.uniform(key, "caption-routing", np.array([0]))[0]
        drawn.append(int(np.searchsorted(cumulative, u * cumulative[-1], side="right")))
    return drawn


def ensemble_velocity(x: Tensor, t: Tensor, cond: Conditioning, experts: Experts, weights: Tensor) -> Tensor:
    """The weighted sum of the experts' guided velocities.

    Each row goes only to the experts that its weights name; rows are grouped by expert, so that each expert is called at most once. With the weights
    on the CPU nothing here waits for the device of the latents.

    Args:
        x: latents (N, C, H, W).
        t: times (N,), where the latents are.
        cond: conditioning of the N rows.
        experts: the experts.
        weights: (N, K), on the CPU; zero means that the row does not visit the expert.

    Returns:
        velocity (N, C, H, W).
    """
    by_expert = weights.cpu().T  # (K, N)
    named = by_expert != 0
    rows = [there.nonzero().flatten().tolist() for there in named]
    counts = [len(there) for there in rows if there]
    # Indices and weights of all visits, (2, M), expert by expert.
    visits = upload(torch.stack([named.nonzero()[:, 1].double(), by_expert[named].double()]), x.device)
    index, scales = visits[0].long(), visits[1]
    indices = index.split(counts)
    called = zip((k for k, there in enumerate(rows) if there), x[index].split(counts), t[index].split(counts), indices, strict=True)
    calls = [ExpertCall(k, some_x, some_t, cond.take(rows[k], there)) for k, some_x, some_t, there in called]
    total = torch.zeros_like(x)
    for v, there, scale in zip(experts.velocities(calls), indices, scales.split(counts), strict=True):
        total.index_add_(0, there, (expand(scale.to(v.dtype), v) * v).to(total.dtype))
    return total
