"""Exponential moving average of weights, with a half-life counted in images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from paris_ray.training.budget import RAMP


def decay(images: int, batch: int, half_life: int) -> float:
    """Share that the old average keeps in an update; the half-life is at most :data:`paris_ray.training.budget.RAMP` of the images so far.

    Args:
        images: images trained on, with this batch.
        batch: images since the update before.
        half_life: images after which a weight's share has halved.
    """
    return float(0.5 ** (batch / min(half_life, RAMP * images)))


class Ema:
    """The average of a model's parameters; those that are not trained are kept as they are.

    Args:
        model: its parameters are copied.
        half_life: in images.
    """

    def __init__(self, model: nn.Module, half_life: int):
        self.half_life = half_life
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._parameters = dict(model.named_parameters())
        trained = [name for name, p in self._parameters.items() if p.requires_grad]
        self._averages = [self.weights[name] for name in trained]
        self._sources = [self._parameters[name].detach() for name in trained]

    @torch.no_grad()
    def update(self, images: int, batch: int) -> None:
        """Move towards the model's weights; see :func:`decay`."""
        torch._foreach_lerp_(self._averages, self._sources, 1.0 - decay(images, batch, self.half_life))

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over averages, in place. Raises ValueError if the names differ."""
        if weights.keys() != self.weights.keys():
            raise ValueError(f"averages: names differ from the model's: {sorted(weights.keys() ^ self.weights.keys())[:5]}")
        for name, mine in self.weights.items():
            mine.copy_(weights[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model has the averages for weights; afterwards, its own again, bit for bit."""
        own = {name: p.data for name, p in self._parameters.items()}
        try:
            for name, p in self._parameters.items():
                p.data = self.weights[name]
            yield
        finally:
            for name, p in self._parameters.items():
                p.data = own[name]
