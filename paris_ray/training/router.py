"""Training of the router, on all shards; beside the experts, or after them."""

from __future__ import annotations

from typing import Any

from paris_ray.config import RunConfig
from paris_ray.stages import CONTROL_ROUTER
from paris_ray.training.launch import train_stage


def train_router(config: RunConfig, control: bool = False) -> dict[str, Any]:
    """Train the router on the cluster that this process is connected to.

    Args:
        config: the run's config.
        control: train the paper's text-blind router instead, into ``control_router/``: a row of the evaluation's table.

    Returns:
        the stage's manifest; counts as for an expert, and accuracy and calibration error (``ece``) on validation rows.

    Raises:
        what :func:`paris_ray.training.launch.train_stage` raises.
    """
    return train_stage(config, CONTROL_ROUTER if control else "router")
