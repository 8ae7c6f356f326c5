"""How good a classifier of rows is: how often it is right, whether its probabilities mean what they say. NumPy only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_ray.evaluation.metrics import Share, calibration_error


@dataclasses.dataclass(frozen=True)
class ClassifierAt:
    """A router, or what knows nothing but the sizes of the clusters, at one time.

    Attributes:
        accuracy: how often the first choice is the row's cluster.
        calibration: expected calibration error.
        log_loss: mean of −log p(the row's cluster), in nats.
    """

    accuracy: Share
    calibration: float
    log_loss: float

    def as_json(self) -> dict[str, Any]:
        return {**self.accuracy.as_json(), "calibration": self.calibration, "log_loss": self.log_loss}


def judged(log_probabilities: NDArray[np.floating], clusters: Sequence[int]) -> ClassifierAt:
    """A classifier by its log-probabilities (N, K) and the true clusters (N,)."""
    wide, own = np.asarray(log_probabilities, np.float64), np.asarray(clusters)
    named = wide.argmax(1)
    right = named == own
    confidence = np.exp(wide[np.arange(len(own)), named])
    return ClassifierAt(Share(int(right.sum()), len(own)), calibration_error(confidence, right), float(-wide[np.arange(len(own)), own].mean()))


def prior(trained: Sequence[int], clusters: Sequence[int], num_experts: int) -> ClassifierAt:
    """What a router must beat: the clusters' shares of the training rows, whatever is shown.

    Args:
        trained: clusters of the training rows.
        clusters: of the rows to judge.
        num_experts: K.
    """
    counts = np.bincount(np.asarray(trained), minlength=num_experts)
    # A cluster without a training row gets the share of half a one: its log is finite.
    shares = np.maximum(counts, 0.5) / np.maximum(counts, 0.5).sum()
    return judged(np.broadcast_to(np.log(shares), (len(clusters), num_experts)), clusters)
