"""Whom rows ask, and with which weights: one router pass over those that are to be routed or weighed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paris_ray import rng
from paris_ray.diffusion.ensemble import draw_experts, reweighted, routing_weights
from paris_ray.diffusion.routing import Routing
from paris_ray.inference.experts import pad_rows, padded
from paris_ray.inference.precision import working_router
from paris_ray.inference.rows import Row, pick

if TYPE_CHECKING:
    from paris_ray.inference.weights import ParisModel
    from paris_ray.models import Router


class Weigher:
    """The model's router, asked for rows of the engine.

    Args:
        model: whose router; it may be given another at any time.
    """

    def __init__(self, model: ParisModel):
        self.model = model
        self._routers: tuple[Router, Router] | None = None  # the model's, and the one that is asked

    def weights(self, rows: list[Row], x: Tensor, t: Tensor, available: list[bool]) -> Tensor:
        """Weights of the experts, (N, K) on the CPU; rows that are to be neither routed nor weighed keep theirs.

        Args:
            rows: N of them; what they are told: weights, which experts were masked, and how much of the router's probability these had.
            x: their states, (N, C, H, W).
            t: their times, (N,).
            available: which experts can be asked.
        """
        missing = [k for k, here in enumerate(available) if not here]
        asking = [n for n, row in enumerate(rows) if row.undecided(missing) or row.several]
        if asking:
            logits = self.logits(pick(x, asking), pick(t, asking), [rows[n].text.pooled for n in asking])
            alike: dict[Routing | None, list[int]] = {}  # at once: the device has nothing to do meanwhile
            for place, n in enumerate(asking):
                alike.setdefault(rows[n].ticket.routing if rows[n].undecided(missing) else None, []).append(place)
            lost = logits.softmax(1)[:, missing].sum(1).tolist()
            for routing, places in alike.items():
                some, theirs = [rows[asking[place]] for place in places], logits[places]
                if routing is None:
                    found = reweighted(theirs, torch.stack([row.weights for row in some if row.weights is not None]))
                else:
                    found = _route(routing, some, theirs, torch.tensor(available))
                for row, weights in zip(some, found, strict=True):
                    row.weights = weights
                    row.masked.update(missing)
                for place, row in zip(places, some, strict=True):
                    row.masked_probability = max(row.masked_probability, min(1.0, lost[place]))
        return torch.stack([row.weights for row in rows if row.weights is not None])

    def logits(self, x: Tensor, t: Tensor, pooled: Sequence[Tensor]) -> Tensor:
        """The router's, (N, K) on the CPU, for states (N, C, H, W) at times (N,) and pooled texts, N of (P,)."""
        model, count = self.model, padded(len(x), x.device)
        if self._routers is None or self._routers[0] is not model.router:
            self._routers = model.router, working_router(model.router, model.precision, model.device)
            if model.compile:
                self._routers[1].compile_blocks()
        router = self._routers[1]
        text = pad_rows(torch.stack(list(pooled)), count) if model.router_reads_text else None
        logits: Tensor = router(pad_rows(x, count).to(router.patch_embed.weight.dtype), pad_rows(t, count), text)
        return logits[: len(x)].float().cpu()


def _route(routing: Routing, rows: Sequence[Row], logits: Tensor, available: Tensor) -> Tensor:
    """Weights of rows with the same routing, (n, K)."""
    drawn = None
    if routing.kind == "caption":
        p = routing_weights(logits, Routing("full"), available)
        drawn = draw_experts(p, [rng.key(row.ticket.request.seed, row.ticket.request.index) for row in rows])
    return routing_weights(logits, routing, available, drawn)
