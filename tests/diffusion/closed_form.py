"""A Gaussian mixture in closed form: posteriors, marginal velocities and noise predictions, written from Bayes' rule alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from paris_ray.diffusion import path
from paris_ray.diffusion.ensemble import Conditioning, ExpertCall

Velocity = Callable[[Tensor, Tensor], Tensor]


class Mixture:
    """Data x_0 ~ Σ_j w_j N(m_j, C_j); cluster k is a set of components. With ``spread`` 0 it is a finite data set: one point per component.

    Everything is for a state z = a·x_0 + b·ε with ε ~ N(0, I). Component j's state is N(a·m_j, a²·C_j + b²·I), diagonal in C_j's eigenbasis.
    """

    def __init__(self, clusters: int = 3, each: int = 2, dim: int = 4, seed: int = 0, spread: float = 1.0):
        g = torch.Generator().manual_seed(seed)
        n = clusters * each
        self.weights = torch.rand(n, generator=g, dtype=torch.float64) + 0.2
        self.weights /= self.weights.sum()
        self.means = torch.randn(n, dim, generator=g, dtype=torch.float64)
        self.basis = torch.linalg.qr(torch.randn(n, dim, dim, generator=g, dtype=torch.float64)).Q  # columns are axes
        self.variances = spread * (0.2 + 0.5 * torch.rand(n, dim, generator=g, dtype=torch.float64)) ** 2  # along them
        self.covariances = self.basis @ torch.diag_embed(self.variances) @ self.basis.mT
        # Dealt out in turn, so that clusters interleave.
        self.cluster = torch.arange(n) % clusters
        self.num_clusters, self.dim = clusters, dim

    def components(self, z: Tensor, a: Tensor, b: Tensor, of: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """log p(j, z) (N, J), E[x_0 | z, j] and E[ε | z, j], each (N, J, D), over all components or some."""
        a, b = a[:, None, None], b[:, None, None]
        means, variances, basis = self.means[of], self.variances[of], self.basis[of]
        variance = a**2 * variances + b**2  # (N, J, D)
        off = torch.einsum("njd,jde->nje", z[:, None] - a * means, basis)  # (N, J, D), along the axes
        log_p = self.weights[of].log() - 0.5 * (off**2 / variance + torch.log(2 * math.pi * variance)).sum(-1)
        x0 = means + torch.einsum("nje,jde->njd", a * variances / variance * off, basis)
        noise = torch.einsum("nje,jde->njd", b / variance * off, basis)
        return log_p, x0, noise

    def expectations(self, z: Tensor, a: Tensor, b: Tensor, cluster: int | None = None) -> tuple[Tensor, Tensor]:
        """E[x_0 | z] and E[ε | z], over all of the data or one cluster of it."""
        log_p, x0, noise = self.components(z, a, b, slice(None) if cluster is None else self.cluster == cluster)
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

    def draw(self, n: int, g: torch.Generator) -> Tensor:
        """Data, (n, D)."""
        j = torch.multinomial(self.weights, n, replacement=True, generator=g)
        z = torch.randn(n, self.dim, generator=g, dtype=torch.float64)
        return self.means[j] + torch.einsum("nde,ne->nd", self.basis[j], self.variances[j].sqrt() * z)

    # -- perfect experts, one per cluster ---------------------------------------------------------------------------------

    def flow_experts(self) -> list[Velocity]:
        return [functools.partial(self.velocity, cluster=k) for k in range(self.num_clusters)]

    def ddpm_experts(self, schedules: Sequence[str]) -> list[Velocity]:
        """Posterior-mean noise on each schedule's own states, as the objective turns it into a velocity."""

        def velocity(x: Tensor, t: Tensor, k: int, objective: path.Ddpm) -> Tensor:
            state, n = objective.model_input(x, t)
            _, noise = self.expectations(state, *objective.schedule.alpha_sigma(n), k)
            return objective.velocity(noise, x, t)

        return [functools.partial(velocity, k=k, objective=path.Ddpm(name)) for k, name in enumerate(schedules)]  # type: ignore[arg-type]


def conditioning(n: int, guidance: float | Tensor = 1.0) -> Conditioning:
    """Conditioning whose text tells rows apart."""
    scale = torch.full((n,), guidance) if isinstance(guidance, float) else guidance
    text = torch.arange(n, dtype=torch.float64).view(n, 1, 1)
    return Conditioning(text, text[:, 0], torch.zeros_like(text), scale, tuple(f"text {i}" for i in range(n)), tuple(f"null {i}" for i in range(n)))


class ExactExperts:
    """Experts that are functions (x (n, D), t (n,)) → velocity (n, D)."""

    def __init__(self, functions: Sequence[Velocity]):
        self.functions, self.num_experts = functions, len(functions)

    def available(self) -> list[bool]:
        return [True] * self.num_experts

    def velocities(self, calls: Sequence[ExpertCall]) -> list[Tensor]:
        return [self.functions[call.expert](call.x.flatten(1), call.t).view_as(call.x) for call in calls]
