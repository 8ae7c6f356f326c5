"""The ensemble's velocity: the theorem in closed form, and the grouping of rows against a loop over rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from paris_ray import rng
from paris_ray.diffusion.ensemble import (
    Conditioning,
    ExpertCall,
    Routing,
    draw_experts,
    ensemble_velocity,
    one_expert,
    routing_weights,
)
from paris_ray.diffusion.sampler import initial_noise, sample, time_grid

from .closed_form import ExactExperts, Mixture, Velocity, conditioning

F64 = torch.float64
TIMES = [0.001, 0.01, 0.1, 0.3, 0.5, 0.501, 0.7, 0.9, 0.99, 0.999]
WHOLE = [Routing("full"), Routing("top", 3)]
"""Strategies that leave three experts' posterior as it is."""


# -- the theorem: u_t(x) = Σ_k p(k | x_t) · u_t^k(x) (arXiv 2501.05450) ---------------------------------------------------


def ensemble(mixture: Mixture, experts: Sequence[Velocity], routing: Routing) -> Velocity:
    """The ensemble of experts under the closed-form posterior p(k | x, t)."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        weights = routing_weights(mixture.cluster_logits(x, t), routing, torch.ones(len(experts), dtype=torch.bool))
        # The latents' shape, (N, C, H, W).
        return ensemble_velocity(x[..., None, None], t, conditioning(len(x)), ExactExperts(experts), weights)[..., 0, 0]

    return velocity


def states(mixture: Mixture, times: list[float], each: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States at each of some times, half of them on a path x_t = (1−t)·x_0 + t·ε and half anywhere: x (N, D), t (N,), and x_0 and ε of the path."""
    g = torch.Generator().manual_seed(1)
    t = torch.tensor(times, dtype=F64).repeat_interleave(each)
    x0, noise = mixture.draw(len(t), g), torch.randn(len(t), mixture.dim, generator=g, dtype=F64)
    anywhere = 2 * torch.randn(len(t), mixture.dim, generator=g, dtype=F64)
    x = torch.where(torch.arange(len(t))[:, None] % 2 == 0, (1 - t[:, None]) * x0 + t[:, None] * noise, anywhere)
    return x, t, x0, noise


def velocity_from_score(mixture: Mixture, x: Tensor, t: Tensor) -> Tensor:
    """The marginal velocity by another road: torch's own density of x_t, its gradient, and Tweedie's formula E[ε | x_t] = −t·∇log p_t(x_t)."""
    x, a = x.clone().requires_grad_(), 1 - t[:, None]
    eye = torch.eye(mixture.dim, dtype=F64)
    parts = MultivariateNormal(a[..., None] * mixture.means, a[..., None, None] ** 2 * mixture.covariances + t[:, None, None, None] ** 2 * eye)
    density = MixtureSameFamily(Categorical(mixture.weights.expand(len(x), -1)), parts)
    (score,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    noise = -t[:, None] * score
    return ((noise - x) / a).detach()


@pytest.mark.parametrize("routing", WHOLE, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_perfect_flow_experts_make_the_marginal_velocity(seed: int, routing: Routing) -> None:
    mixture = Mixture(seed=seed)
    x, t, _, _ = states(mixture, TIMES)
    v = ensemble(mixture, mixture.flow_experts(), routing)(x, t)
    torch.testing.assert_close(v, velocity_from_score(mixture, x, t), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("routing", WHOLE, ids=str)
@pytest.mark.parametrize("schedules", [("cosine",) * 3, ("linear",) * 3, ("cosine", "linear")], ids="-".join)
def test_ddpm_experts_matched_by_ratio_make_the_same(schedules: tuple[str, ...], routing: Routing) -> None:
    """Alone and beside a flow expert, wherever α ≥ 0.01: up to t = 0.99."""
    mixture = Mixture()
    experts = mixture.ddpm_experts(schedules) + mixture.flow_experts()[len(schedules) :]
    x, t, _, _ = states(mixture, [time for time in TIMES if time <= 0.99])
    v = ensemble(mixture, experts, routing)(x, t)
    torch.testing.assert_close(v, velocity_from_score(mixture, x, t), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("routing", WHOLE, ids=str)
def test_a_finite_data_set_is_partitioned_exactly(routing: Routing) -> None:
    """Points instead of Gaussians: the experts' posterior-mean velocities against a loop over all points, in plain Python."""
    data = Mixture(each=8, spread=0.0)
    x, t, _, _ = states(data, TIMES, each=6)
    expected = []
    for row, time in zip(x.tolist(), t.tolist(), strict=True):
        # The noise that leads from each point to here, how likely it is, and the velocity of that path.
        noises = [[(value - (1 - time) * m) / time for value, m in zip(row, point, strict=True)] for point in data.means.tolist()]
        logs = [math.log(w) - sum(e * e for e in noise) / 2 for w, noise in zip(data.weights.tolist(), noises, strict=True)]
        shares = [math.exp(value - max(logs)) for value in logs]
        paths = [[e - m for e, m in zip(noise, point, strict=True)] for noise, point in zip(noises, data.means.tolist(), strict=True)]
        expected.append([math.fsum(s * v for s, v in zip(shares, column, strict=True)) / math.fsum(shares) for column in zip(*paths, strict=True)])
    v = ensemble(data, data.flow_experts(), routing)(x, t)
    # The velocity towards a point is (x − x_0)/t: up to 1e4 for a state that is on no path.
    torch.testing.assert_close(v, torch.tensor(expected, dtype=F64), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("routing", WHOLE, ids=str)
def test_at_the_ends(routing: Routing) -> None:
    mixture = Mixture()
    x, t, _, _ = states(mixture, [0.0, 1.0])
    mean = (mixture.weights[:, None] * mixture.means).sum(0)
    # E[ε] = 0 where x_0 is seen, and E[x_0] is the prior's where only noise is.
    expected = torch.where(t[:, None] == 0, -x, x - mean)
    torch.testing.assert_close(ensemble(mixture, mixture.flow_experts(), routing)(x, t), expected, rtol=1e-10, atol=1e-10)
    # Noise says nothing about x_0 at the end: |x̂_0| ≤ 20 is what is left of a schedule there.
    x, t, _, _ = states(mixture, [0.0, 1e-9, 0.999, 1 - 1e-9, 1.0])
    for name in ("cosine", "linear"):
        v = ensemble(mixture, mixture.ddpm_experts([name] * 3), routing)(x, t)
        assert torch.isfinite(v).all()
        assert (v.abs() <= x.abs() + 21).all()
    # Points, on the path to one of them: the posterior is that point, and the velocity the path's own.
    data = Mixture(each=8, spread=0.0)
    x, t, x0, noise = states(data, [1e-6, 1e-4])
    v = ensemble(data, data.flow_experts(), routing)(x, t)
    torch.testing.assert_close(v[::2], (noise - x0)[::2], rtol=0, atol=1e-8)


def standard_scores(mixture: Mixture, x: Tensor) -> Tensor:
    """By how many standard errors the samples' component weights, means and covariances are off, (J · (1 + D + D²),).

    With r_j(x) = p(j | x) the mixture itself has E[r_j] = w_j, E[r_j·(x − m_j)] = 0 and E[r_j·((x − m_j)(x − m_j)ᵀ − C_j)] = 0. The standard error
    of each mean over N samples is the standard deviation of what is averaged, over √N.
    """
    log_p, _, _ = mixture.components(x, torch.ones(len(x), dtype=F64), torch.zeros(len(x), dtype=F64))
    share = torch.softmax(log_p, 1)  # (N, J)
    off = x[:, None] - mixture.means  # (N, J, D)
    second = off[..., :, None] * off[..., None, :] - mixture.covariances  # (N, J, D, D)
    terms = torch.cat([share - mixture.weights, (share[..., None] * off).flatten(1), (share[..., None, None] * second).flatten(1)], 1)
    return terms.mean(0) / (terms.std(0) / math.sqrt(len(x)))


@pytest.mark.parametrize(("solver", "steps"), [("euler", 200), ("heun", 30), ("midpoint", 30), ("dpmpp_2m", 60)])
def test_sampling_the_ensemble_draws_the_mixture(solver: str, steps: int) -> None:
    """Weights, means and covariances within 4.5 standard errors: of 42 numbers, one time in 3000 one is further off by chance; seeds are fixed."""
    mixture = Mixture(dim=2, seed=3)
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(3000, 2, generator=g, dtype=F64)
    experts = mixture.ddpm_experts(["cosine", "linear"]) + mixture.flow_experts()[2:]
    scores = standard_scores(mixture, sample(ensemble(mixture, experts, Routing("full")), noise, time_grid(steps), solver))
    assert scores.abs().max() < 4.5
    assert standard_scores(mixture, mixture.draw(3000, g)).abs().max() < 4.5


def test_sampling_with_wrong_weights_does_not() -> None:
    """What the test above can see: routing that keeps only the best expert, or weighs all alike, draws something else."""
    mixture = Mixture(dim=2, seed=3)
    noise = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    best = sample(ensemble(mixture, mixture.flow_experts(), Routing("top", 1)), noise, time_grid(30), "heun")
    assert standard_scores(mixture, best).abs().max() > 20

    def alike(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack([expert(x, t) for expert in mixture.flow_experts()]).mean(0)

    assert standard_scores(mixture, sample(alike, noise, time_grid(30), "heun")).abs().max() > 20


# -- rows and experts ---------------------------------------------------------------------------------------------------


class RowwiseExperts:
    """Velocities that depend on the row, the expert, the time and the conditioning, so that any mix-up shows."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.rounds: list[list[ExpertCall]] = []

    def available(self) -> list[bool]:
        return [True] * self.num_experts

    @staticmethod
    def one(k: int, x: Tensor, t: Tensor, text: Tensor, guidance: Tensor) -> Tensor:
        return torch.sin((k + 1) * x) + t * (k + 2) + 0.1 * text.sum() * (k + 1) + guidance * x**2

    def velocities(self, calls: Sequence[ExpertCall]) -> list[Tensor]:
        self.rounds.append(list(calls))
        return [
            torch.stack([self.one(call.expert, call.x[i], call.t[i], call.cond.text[i], call.cond.guidance[i]) for i in range(len(call.x))])
            for call in calls
        ]


def random_weights(g: torch.Generator, n: int, k: int, seed: int) -> Tensor:
    """Weights (n, k) from a strategy with some experts missing, or any numbers with holes in them, rows of nothing included."""
    if seed % 6 == 5:
        return torch.randn(n, k, generator=g, dtype=F64) * (torch.rand(n, k, generator=g) > 0.5)
    available = torch.rand(k, generator=g) > 0.3
    available[seed % k] = True
    top = Routing("top", 1 + int(torch.randint(k, (1,), generator=g)))
    routing = [Routing("full"), top, top, top, Routing("threshold")][seed % 6]
    return routing_weights(3 * torch.randn(n, k, generator=g, dtype=F64), routing, available)


@pytest.mark.parametrize("seed", range(60))
def test_grouped_rows_are_the_loop_over_rows(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    n, k = (int(torch.randint(1, high, (1,), generator=g)) for high in (13, 9))
    x, t = torch.randn(n, 3, 2, 2, generator=g, dtype=F64), torch.rand(n, generator=g, dtype=F64)
    cond = conditioning(n, torch.rand(n, generator=g, dtype=F64) * 8 + 1)
    weights = random_weights(g, n, k, seed)
    experts = RowwiseExperts(k)
    v = ensemble_velocity(x, t, cond, experts, weights)

    expected = torch.zeros_like(x)
    for i, j in itertools.product(range(n), range(k)):
        if weights[i, j] != 0:
            expected[i] += weights[i, j] * RowwiseExperts.one(j, x[i], t[i], cond.text[i], cond.guidance[i])
    torch.testing.assert_close(v, expected, rtol=1e-12, atol=1e-12)

    # Asked once; every expert at most once, with exactly its own rows and their conditioning.
    (calls,) = experts.rounds
    assert len({call.expert for call in calls}) == len(calls)
    assert {call.expert for call in calls} == {j for j in range(k) if bool((weights[:, j] != 0).any())}
    for call in calls:
        rows = (weights[:, call.expert] != 0).nonzero().squeeze(1)
        assert torch.equal(call.x, x[rows])
        assert torch.equal(call.t, t[rows])
        assert torch.equal(call.cond.text, cond.text[rows])
        assert torch.equal(call.cond.guidance, cond.guidance[rows])
        assert call.cond.text_keys == tuple(f"text {i}" for i in rows.tolist())
        assert call.cond.null_keys == tuple(f"null {i}" for i in rows.tolist())


def test_nothing_waits_for_the_device() -> None:
    """Latents, times and texts on torch's meta device, which has no numbers to wait for: asking for one, or for how many there are, raises."""
    x, t, text = torch.empty(5, 3, 2, 2, device="meta"), torch.empty(5, device="meta"), torch.empty(5, 4, 6, device="meta")
    for ask in (x[0, 0, 0, 0].item, t.tolist, t.nonzero, t.cpu):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask()
    cond = Conditioning(text, text[:, 0], text, torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0]), tuple("abcde"), tuple("vwxyz"))

    class Experts:
        num_experts = 3

        def available(self) -> list[bool]:
            return [True] * 3

        def velocities(self, calls: Sequence[ExpertCall]) -> list[Tensor]:
            assert [(call.expert, call.cond.text_keys, call.cond.guidance.tolist()) for call in calls] == [
                (0, ("a", "c"), [1.0, 1.0]),
                (2, ("b", "c", "d", "e"), [2.0, 1.0, 3.0, 1.0]),
            ]
            return [call.x + call.t[:, None, None, None] for call in calls]

    weights = torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0.4, 0, 0.6], [0, 0, 1.0], [0, 0, 1.0]])
    v = ensemble_velocity(x, t, cond, Experts(), weights)
    assert (v.shape, v.device.type) == (x.shape, "meta")


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "dpmpp_2m"])
def test_a_picture_is_the_same_alone_and_in_a_batch(solver: str) -> None:
    """From its seed to its end; bytes are the engine's promise, this is the arithmetic."""
    mixture = Mixture(dim=4)
    velocity = ensemble(mixture, mixture.flow_experts(), Routing("top", 2))

    def draw(indices: Sequence[int]) -> Tensor:
        noise = torch.stack([initial_noise(11, i, (4,)) for i in indices]).double()
        return sample(velocity, noise, time_grid(8), solver)

    together = draw([4, 0, 7, 2, 9, 1])
    for place, index in enumerate([4, 0, 7, 2, 9, 1]):
        torch.testing.assert_close(draw([index])[0], together[place], rtol=1e-11, atol=1e-11)
    assert torch.pdist(together).min() > 1e-3


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


def test_one_expert_to_the_end() -> None:
    """``expert-k``, ``caption`` once drawn, and ``oracle``: one-hot weights, whatever the router says; one that is not there is named."""
    logits, there = torch.randn(3, 4), torch.tensor([True, True, False, True])
    assert routing_weights(logits, Routing("expert", 1), there).tolist() == [[0, 1, 0, 0]] * 3
    for kind in ("caption", "oracle"):
        assert routing_weights(logits, Routing(kind), there, [3, 0, 1]).tolist() == [[0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]]
        with pytest.raises(ValueError, match="expert 2 is not available, and the routing of row 1 allows no other; available: 0, 1, 3"):
            routing_weights(logits, Routing(kind), there, [3, 2, 1])
        with pytest.raises(ValueError, match=f"routing {kind} is decided once per picture"):
            routing_weights(logits, Routing(kind), there)
    with pytest.raises(ValueError, match="expert 4 is not available"):
        one_expert([4], there)
    with pytest.raises(ValueError, match="routing: 'best' is not one of top, threshold, full, caption, expert, oracle"):
        routing_weights(logits, Routing("best"), there)


def test_the_oracle_of_a_partitioned_data_set() -> None:
    """Rows on the path to a point, routed to its cluster: near the data the velocity is that path's own, whatever the others are."""
    data = Mixture(each=8, spread=0.0)
    x, t, x0, noise = states(data, [1e-4], each=24)
    nearest = torch.cdist(x0, data.means).argmin(1)
    weights = routing_weights(torch.zeros(24, 3), Routing("oracle"), torch.ones(3, dtype=torch.bool), data.cluster[nearest].tolist())
    v = ensemble_velocity(x[..., None, None], t, conditioning(24), ExactExperts(data.flow_experts()), weights)[..., 0, 0]
    torch.testing.assert_close(v[::2], (noise - x0)[::2], rtol=0, atol=1e-7)


def test_the_draw_by_caption_is_the_inverse_of_the_distribution() -> None:
    p = torch.softmax(torch.randn(400, 5, generator=torch.Generator().manual_seed(0), dtype=F64), 1)
    p[:, 3] = 0.0
    keys = [rng.key(7, i) for i in range(400)]
    drawn = draw_experts(p, keys)
    for row, key, k in zip(p.tolist(), keys, drawn, strict=True):
        u = rng.uniform(key, "caption-routing", np.array([0]))[0] * sum(row)
        assert sum(row[:k]) <= u < sum(row[: k + 1])
    # Row by row: alone, in another order, and scaled.
    assert [draw_experts(p[i : i + 1], keys[i : i + 1])[0] for i in (5, 3)] == [drawn[5], drawn[3]]
    assert draw_experts(7 * p, keys) == drawn
    # As often as it says: five standard deviations.
    p = p / p.sum(1, keepdim=True)
    off = np.bincount(drawn, minlength=5) - p.sum(0).numpy()
    assert (np.abs(off) <= 5 * np.sqrt((p * (1 - p)).sum(0).numpy())).all()


def test_names_of_strategies() -> None:
    for text in ("top-1", "top-8", "threshold", "full", "caption", "expert-0", "expert-7"):
        assert str(Routing.parse(text, 8)) == text
    for text in ("top-0", "top-9", "expert-8", "Top-2", "top-", "top--1", "oracle", "", "top-2 ", "top-٢", "x" * 500):
        with pytest.raises(ValueError, match="is not one of top-1 … top-8") as caught:
            Routing.parse(text, 8)
        assert len(str(caught.value)) < 300
    assert str(Routing("oracle")) == "oracle"  # has a name, and no place in a request
