"""How much the training stages have to do, and how long what is left of them will take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from paris_ray import stages
from paris_ray.config import RunConfig
from paris_ray.training.budget import total_images


def _spec(config: RunConfig, name: str) -> Any:
    return config.experts[int(name.removeprefix("expert-"))] if name.startswith("expert-") else config.router


def image_work(config: RunConfig, name: str) -> float:
    """About how much one image of a training stage is: the weights that it passes."""
    model = _spec(config, name).model
    return float(model.num_layers * model.hidden_size**2)


def work(config: RunConfig, name: str) -> float:
    """About how much a training stage has to do, from its first image to its last, so that the longest can start first."""
    train, rows = _spec(config, name).train, 0
    if train.images is None:
        sizes = stages.cluster_sizes(config)
        rows = sizes[int(name.removeprefix("expert-"))] if name.startswith("expert-") else sum(sizes)
    return total_images(train, rows) * image_work(config, name)


def training_to_go(config: RunConfig, todo: Iterable[str], events: Mapping[str, Mapping[str, Any] | None]) -> float | None:
    """Seconds until the last training ends.

    The rule: what is left of all trainings (work, as above), at the mean speed of those that run now, as many at once as run now and at least one; or
    what is left of the largest one, if that is longer. A training that has not begun counts whole. Starts and other stages are not in it.

    Args:
        config: the run's.
        todo: stages that are not done.
        events: the last event of each running stage, ``None`` for one that has said nothing yet.

    Returns:
        seconds, ``None`` while no training runs whose speed is known, or when none is left.
    """
    left: dict[str, float | None] = {}
    speeds = []
    for name in filter(stages.trains, todo):
        event = events.get(name)
        if event is None or not event["total"]:
            left[name] = None
            continue
        one = image_work(config, name)
        left[name] = (event["total"] - event["done"]) * one
        if event["rate"] > 0:
            speeds.append(event["rate"] * one)
    if not speeds:
        return None
    whole = [work(config, name) if known is None else known for name, known in left.items()]
    speed = sum(speeds) / len(speeds)
    at_once = sum(stages.trains(name) for name in events)
    return max(sum(whole) / (speed * at_once), max(whole) / speed)
