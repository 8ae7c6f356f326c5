"""A Gaussian mixture in closed form: posteriors, marginal velocities and noise predictions, written from Bayes' rule alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paris_ray.diffusion.ensemble import Conditioning, ExpertCall


class Mixture:
    """Data x_0 ~ Σ_j w_j N(m_j, s_j² I); cluster k is a set of components.

    Everything is for a state z = a·x_0 + b·ε with ε ~ N(0, I).
    """

    def __init__(self, clusters: int = 3, each: int = 2, dim: int = 4, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        n = clusters * each
        self.weights = torch.rand(n, generator=g, dtype=torch.float64) + 0.2
        self.weights /= self.weights.sum()
        self.means = torch.randn(n, dim, generator=g, dtype=torch.float64)
        self.stds = 0.2 + 0.5 * torch.rand(n, generator=g, dtype=torch.float64)
        self.cluster = torch.arange(n) // each
        self.num_clusters, self.dim = clusters, dim

    def components(self, z: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p(j, z) (N, J), E[x_0 | z, j] and E[ε | z, j], each (N, J, D)."""
        a, b = a[:, None], b[:, None]
        variance = (a * self.stds) ** 2 + b**2  # (N, J)
        off = z[:, None] - a[..., None] * self.means  # (N, J, D)
        log_p = self.weights.log() - 0.5 * (off**2).sum(-1) / variance - 0.5 * self.dim * torch.log(2 * math.pi * variance)
        x0 = self.means + (a * self.stds**2 / variance)[..., None] * off
        noise = (b / variance)[..., None] * off
        return log_p, x0, noise

    def expectations(self, z: Tensor, a: Tensor, b: Tensor, cluster: int | None = None) -> tuple[Tensor, Tensor]:
        """E[x_0 | z] and E[ε | z], over all of the data or one cluster of it."""
        log_p, x0, noise = self.components(z, a, b)
        if cluster is not None:
            log_p = log_p.masked_fill(self.cluster != cluster, -torch.inf)
        share = torch.softmax(log_p, 1)[..., None]
        return (share * x0).sum(1), (share * noise).sum(1)

    def velocity(self, x: Tensor, t: Tensor, cluster: int | None = None) -> Tensor:
        """Marginal velocity E[ε − x_0 | x_t] on the linear path."""
        x0, noise = self.expectations(x, 1 - t, t, cluster)
        return noise - x0

    def cluster_logits(self, x: Tensor, t: Tensor) -> Tensor:
        """log p(k, x_t), (N, K)."""
        log_p, _, _ = self.components(x, 1 - t, t)
        return torch.stack([torch.logsumexp(log_p[:, self.cluster == k], 1) for k in range(self.num_clusters)], 1)


def conditioning(n: int, guidance: float | Tensor = 1.0) -> Conditioning:
    """Conditioning whose text tells rows apart."""
    scale = torch.full((n,), guidance) if isinstance(guidance, float) else guidance
    text = torch.arange(n, dtype=torch.float64).view(n, 1, 1)
    return Conditioning(text, text[:, 0], torch.zeros_like(text), scale, tuple(f"d{i}" for i in range(n)))


class ExactExperts:
    """Experts that know their cluster in closed form; calls are kept."""

    def __init__(self, mixture: Mixture, velocity: Sequence[object]):
        self.mixture, self.functions, self.num_experts = mixture, velocity, len(velocity)
        self.calls: list[list[ExpertCall]] = []

    def available(self) -> list[bool]:
        return [True] * self.num_experts

    def velocities(self, calls: Sequence[ExpertCall]) -> list[Tensor]:
        self.calls.append(list(calls))
        return [self.functions[call.expert](call.x.flatten(1), call.t).view_as(call.x) for call in calls]  # type: ignore[operator]
