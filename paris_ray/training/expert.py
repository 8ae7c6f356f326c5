"""Training of one expert, alone: its whole input is one shard, the encoders and the config; its whole output is its own folder."""

from __future__ import annotations

from typing import Any

from paris_ray.config import RunConfig
from paris_ray.stages import expert_name
from paris_ray.training.launch import train_stage


def train_expert(config: RunConfig, k: int) -> dict[str, Any]:
    """Train expert ``k`` on the cluster that this process is connected to.

    Reads ``shards/expert=k`` and ``encoders/``, writes ``experts/k`` and ``events/expert-k.json``, and nothing else: no other expert need exist.

    Returns:
        the stage's manifest; counts are images, seconds, images_per_second, loss, validation_loss, rows, restarts.

    Raises:
        what :func:`paris_ray.training.launch.train_stage` raises.
    """
    return train_stage(config, expert_name(k))
