"""The random draws of training: everything about sample i is a function of (seed, stage, i) alone.

So a run that resumes draws what it would have drawn, and a worker of several draws its slice of the batch without asking the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paris_ray import rng


@dataclass(frozen=True)
class Draw:
    """Draws of n samples.

    Attributes:
        rows: which row of the training data, (n,) int64.
        u: uniform draws in [0, 1) that become times, (n,) float32.
        dropped: whether the caption is replaced by the empty one, (n,) bool.
        noise: standard normal, (n, *shape) float32.
    """

    rows: NDArray[np.int64]
    u: NDArray[np.float32]
    dropped: NDArray[np.bool_]
    noise: NDArray[np.float32]


class Draws:
    """Draws by global sample number.

    Rows come in epochs: samples e·rows … (e+1)·rows − 1 visit each row once, in an order drawn for epoch e.

    Args:
        seed: the run's seed.
        stage: the stage's name; each stage has its own streams.
        rows: rows of the training data.
        shape: shape of one sample's noise.
        dropout: probability that a caption is dropped.
    """

    def __init__(self, seed: int, stage: str, rows: int, shape: tuple[int, ...], dropout: float):
        self.seed, self.rows, self.shape, self.dropout = seed, rows, shape, dropout
        self._order_stream, self._sample_stream = f"{stage}/order", f"{stage}/sample"
        self._orders: dict[int, NDArray[np.int64]] = {}

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = rng.permutation(self.seed, self._order_stream, epoch, self.rows)
        return self._orders[epoch]

    def __call__(self, start: int, stop: int) -> Draw:
        """The draws of samples start … stop − 1."""
        n = stop - start
        rows = np.array([self._order(i // self.rows)[i % self.rows] for i in range(start, stop)], np.int64)
        u, chance = np.empty(n, np.float32), np.empty(n, np.float32)
        noise = np.empty((n, *self.shape), np.float32)
        for j in range(n):
            # One generator a sample: setting one up costs as much as a small latent's noise.
            generator = rng.generator(self.seed, self._sample_stream, start + j)
            u[j], chance[j] = generator.random(2, dtype=np.float32)
            generator.standard_normal(out=noise[j], dtype=np.float32)
        return Draw(rows, u, chance < self.dropout, noise)
