"""The ensemble's velocity: the theorem in closed form, and the grouping of rows against a loop over rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from paris_ray.diffusion import path
from paris_ray.diffusion.ensemble import ExpertCall, Routing, ensemble_velocity, routing_weights

from .closed_form import ExactExperts, Mixture, conditioning

F64 = torch.float64


def states(n: int, dim: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(n, dim, 1, 1, generator=g, dtype=F64), torch.rand(n, generator=g, dtype=F64) * 0.96 + 0.02


def test_full_routing_of_perfect_experts_is_the_marginal_velocity() -> None:
    """u_t(x) = Σ_k p(k | x_t) u_t^k(x): the theorem of arXiv 2501.05450, by Bayes' rule on both sides."""
    mixture = Mixture()
    experts = ExactExperts(mixture, [functools.partial(mixture.velocity, cluster=k) for k in range(3)])
    x, t = states(40, 4)
    logits = mixture.cluster_logits(x.flatten(1), t)
    weights = routing_weights(logits, Routing("full"), torch.ones(3, dtype=torch.bool))
    v = ensemble_velocity(x, t, conditioning(40), experts, weights)
    torch.testing.assert_close(v.flatten(1), mixture.velocity(x.flatten(1), t), rtol=1e-10, atol=1e-10)


def test_ddpm_experts_matched_by_ratio_give_the_same_velocity() -> None:
    mixture = Mixture()

    def ddpm(x: Tensor, t: Tensor, k: int, objective: path.Ddpm) -> Tensor:
        state, n = objective.model_input(x, t)
        _, noise = mixture.expectations(state, *objective.schedule.alpha_sigma(n), k)
        return objective.velocity(noise, x, t)

    # One of each: a cosine and a linear noise predictor beside a flow expert.
    experts = ExactExperts(
        mixture,
        [
            functools.partial(ddpm, k=0, objective=path.Ddpm("cosine")),
            functools.partial(ddpm, k=1, objective=path.Ddpm("linear")),
            functools.partial(mixture.velocity, cluster=2),
        ],
    )
    x, t = states(40, 4)
    weights = torch.softmax(mixture.cluster_logits(x.flatten(1), t), 1)
    v = ensemble_velocity(x, t, conditioning(40), experts, weights)
    torch.testing.assert_close(v.flatten(1), mixture.velocity(x.flatten(1), t), rtol=1e-10, atol=1e-9)


class RowwiseExperts:
    """Velocities that depend on the row, the expert, the time and the conditioning, so that any mix-up shows."""

    num_experts = 5

    def __init__(self) -> None:
        self.calls: list[ExpertCall] = []

    def available(self) -> list[bool]:
        return [True] * 5

    @staticmethod
    def one(k: int, x: Tensor, t: Tensor, text: Tensor, guidance: Tensor) -> Tensor:
        return torch.sin((k + 1) * x) + t * (k + 2) + 0.1 * text.sum() * (k + 1) + guidance * x**2

    def velocities(self, calls: Sequence[ExpertCall]) -> list[Tensor]:
        self.calls += calls
        return [
            torch.stack([self.one(call.expert, call.x[i], call.t[i], call.cond.text[i], call.cond.guidance[i]) for i in range(len(call.x))])
            for call in calls
        ]


@pytest.mark.parametrize("seed", range(12))
def test_grouped_rows_are_the_loop_over_rows(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    n, k = int(torch.randint(1, 12, (1,), generator=g)), 5
    x, t = states(n, 6, seed)
    cond = conditioning(n, torch.rand(n, generator=g, dtype=F64) * 8 + 1)
    logits = 3 * torch.randn(n, k, generator=g, dtype=F64)
    available = torch.rand(k, generator=g) > 0.3
    available[seed % k] = True
    routing = [Routing("full"), Routing("top", 1), Routing("top", 2), Routing("top", 4), Routing("threshold")][seed % 5]
    weights = routing_weights(logits, routing, available)
    experts = RowwiseExperts()
    v = ensemble_velocity(x, t, cond, experts, weights)

    expected = torch.zeros_like(x)
    for i in range(n):
        for j in range(k):
            if weights[i, j] != 0:
                expected[i] += weights[i, j] * RowwiseExperts.one(j, x[i], t[i], cond.text[i], cond.guidance[i])
    torch.testing.assert_close(v, expected, rtol=1e-12, atol=1e-12)

    # Every expert at most once, with exactly its own rows and their conditioning.
    assert len({call.expert for call in experts.calls}) == len(experts.calls)
    for call in experts.calls:
        rows = (weights[:, call.expert] != 0).nonzero().squeeze(1)
        assert torch.equal(call.x, x[rows])
        assert torch.equal(call.t, t[rows])
        assert call.cond.digests == tuple(cond.digests[i] for i in rows.tolist())
    assert {call.expert for call in experts.calls} == {j for j in range(k) if bool((weights[:, j] != 0).any())}


@pytest.mark.parametrize("seed", range(6))
def test_weights_are_masked_then_renormalised_then_chosen(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(7, 6, generator=g, dtype=F64)
    available = torch.tensor([True, False, True, True, False, True])
    p = torch.exp(logits) * available
    p = p / p.sum(1, keepdim=True)
    for k in (1, 2, 3, 6):
        found = routing_weights(logits, Routing("top", k), available)
        for i in range(7):
            kept = sorted(range(6), key=lambda j, i=i: (-float(p[i, j]), j))[: min(k, 4)]  # type: ignore[misc]
            expected = torch.tensor([float(p[i, j]) if j in kept else 0.0 for j in range(6)], dtype=F64)
            torch.testing.assert_close(found[i], expected / expected.sum(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(routing_weights(logits, Routing("full"), available), p, rtol=1e-12, atol=1e-14)
    found = routing_weights(logits, Routing("threshold"), available)
    kept = torch.where((p >= 0.1) | (p == p.max(1, keepdim=True).values), p, torch.zeros_like(p))
    torch.testing.assert_close(found, kept / kept.sum(1, keepdim=True), rtol=1e-12, atol=1e-14)
    assert (found[:, ~available] == 0).all()


def test_ties_go_to_the_lower_expert_and_sums_are_one() -> None:
    weights = routing_weights(torch.zeros(2, 4), Routing("top", 2), torch.tensor([True, True, True, True]))
    assert weights.tolist() == [[0.5, 0.5, 0, 0]] * 2
    assert routing_weights(torch.randn(3, 4).bfloat16(), Routing("top", 2), torch.ones(4, dtype=torch.bool)).dtype == torch.float32


def test_no_expert_and_no_logits_strategy_are_refused() -> None:
    with pytest.raises(ValueError, match="no expert is available"):
        routing_weights(torch.zeros(1, 2), Routing("full"), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="once per picture"):
        routing_weights(torch.zeros(1, 2), Routing("caption"), torch.ones(2, dtype=torch.bool))


def test_names_of_strategies() -> None:
    for text in ("top-1", "top-8", "threshold", "full", "caption", "expert-0", "expert-7"):
        assert str(Routing.parse(text, 8)) == text
    for text in ("top-0", "top-9", "expert-8", "Top-2", "top-", "top--1", "oracle", "", "top-2 ", "top-٢", "x" * 500):
        with pytest.raises(ValueError, match="is not one of top-1 … top-8") as caught:
            Routing.parse(text, 8)
        assert len(str(caught.value)) < 300
    assert Routing.parse("full", 8).needs_router_each_step
    assert not Routing.parse("caption", 8).needs_router_each_step
