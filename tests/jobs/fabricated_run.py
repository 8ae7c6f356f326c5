"""A run directory whose corpus is made up and whose shards are real: trainings can be run and followed in it, without embed and partition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_training_run as fake
import numpy as np
from fabricated_cluster import publish

from paris_ray import stages
from paris_ray.config import RunConfig
from paris_ray.storage import Folder


def make(path: Path, poisoned: dict[int, int] | None = None, **sets: Any) -> RunConfig:
    """Everything before the trainings is valid.

    Args:
        path: the run directory.
        poisoned: by expert, a row of its training data, in the order of ids, whose latent is no number.
        sets: settings over the preset ``tiny``, with ``__`` for dots.
    """
    config = fake.make_run(path, experts=[], **sets)
    publish(config, "embed")
    for k in range(config.num_experts):
        rows = fake.rows_of(k)
        if poisoned and k in poisoned:
            rows["latent"][rows["id"].index(train_ids(rows)[poisoned[k]]), 0, 0, 0] = np.nan
        fake.write_shard(Folder(path), k, rows)
        stages.stage(config, f"shard-{k}").publish({"rows": len(rows["id"])})
    publish(config, "partition")
    return config


def train_ids(rows: dict[str, Any]) -> list[str]:
    """Ids of the rows that are trained on, in the order in which the loop counts them."""
    return sorted(one for one, split in zip(rows["id"], rows["split"], strict=True) if split == "train")
