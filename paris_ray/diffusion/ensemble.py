"""Many experts, one velocity: u_t(x) = Σ_k p(k | x, t) · u_t^k(x)  (arXiv 2510.03434, 2501.05450).

The only code that knows that experts are many. Exact for any weights: the marginal flow is linear in the data distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from paris_ray.diffusion.routing import Routing


@dataclass(frozen=True)
class Conditioning:
    """What rows are conditioned on.

    Attributes:
        text: text states (N, S, D).
        pooled: pooled text (N, P).
        null_text: states of the empty caption, or of the negative prompt, (N, S, D).
        guidance: guidance scale per row (N,); 1 is off and costs one pass.
        digests: one key per row, ``digest of text:digest of null_text``, so that experts may cache what they computed from either.
    """

    text: Tensor
    pooled: Tensor
    null_text: Tensor
    guidance: Tensor
    digests: tuple[str, ...]

    def __getitem__(self, rows: Tensor) -> Conditioning:
        picked = tuple(self.digests[i] for i in rows.tolist())
        return Conditioning(self.text[rows], self.pooled[rows], self.null_text[rows], self.guidance[rows], picked)

    def __len__(self) -> int:
        return self.text.shape[0]


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

    def available(self) -> list[bool]:
        """Which experts can be called now."""
        ...

    def velocities(self, calls: Sequence[ExpertCall]) -> list[Tensor]:
        """Guided velocities, one tensor (n, C, H, W) per call, in the order of the calls."""
        ...


# -- routing ------------------------------------------------------------------------------------------------------------

THRESHOLD = 0.1
"""``threshold`` keeps the experts with at least this probability, and always the largest; no source states a rule, this one is ours."""


def routing_weights(logits: Tensor, routing: Routing, available: Tensor) -> Tensor:
    """Weights of the experts from the router's logits.

    A missing expert is masked and the rest renormalised *before* the strategy chooses.

    Args:
        logits: (N, K).
        routing: ``top``, ``threshold`` or ``full``.
        available: (K,) bool.

    Returns:
        (N, K), rows sum to 1, float32 or wider.

    Raises:
        ValueError: no expert is available, or the strategy is not decided by logits alone.
    """
    if not bool(available.any()):
        raise ValueError("no expert is available")
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
        raise ValueError(f"routing {routing} is decided once per picture, not from one step's logits")
    return kept / kept.sum(-1, keepdim=True)


def ensemble_velocity(x: Tensor, t: Tensor, cond: Conditioning, experts: Experts, weights: Tensor) -> Tensor:
    """The weighted sum of the experts' guided velocities.

    Each row goes only to the experts that its weights name; rows are grouped by expert, so that each expert is called at most once.

    Args:
        x: latents (N, C, H, W).
        t: times (N,).
        cond: conditioning of the N rows.
        experts: the experts.
        weights: (N, K); zero means that the row does not visit the expert.

    Returns:
        velocity (N, C, H, W).
    """
    # Decided on the CPU once: a comparison per expert on a GPU would wait for the device each time.
    named = weights.cpu() != 0
    rows = {k: named[:, k].nonzero().squeeze(1) for k in range(weights.shape[1]) if bool(named[:, k].any())}
    calls = []
    for k, index in rows.items():
        everyone = len(index) == x.shape[0]
        there = index.to(x.device)
        calls.append(ExpertCall(k, x if everyone else x[there], t if everyone else t[there], cond if everyone else cond[there]))
    total = torch.zeros_like(x)
    for call, v in zip(calls, experts.velocities(calls), strict=True):
        there = rows[call.expert].to(x.device)
        scaled = weights[there, call.expert].to(v.dtype).view(-1, *[1] * (x.dim() - 1)) * v
        total.index_add_(0, there, scaled.to(total.dtype))
    return total
