"""Where to train what, and what it will take: from a table of machines, or from what was measured on this one. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from paris_ray import stages
from paris_ray.config import ConfigError, ModelConfig, RunConfig, Strict, TrainedConfig
from paris_ray.data.report import cost
from paris_ray.training import memory, preemption
from paris_ray.training.budget import MFU, PEAK_TFLOPS, Inputs
from paris_ray.training.goodput import best_interval, goodput, goodput_with_notice
from paris_ray.training.placement import Placement, place

USABLE = 0.9
"""Share of a device's memory that is counted on: the rest is the driver's, the allocator's and the libraries'."""

ENOUGH = 0.9
"""Goodput below which other checkpoints are proposed."""


class Devices(Strict):
    """Devices of one kind that can be had."""

    name: str
    count: Annotated[int, Field(ge=1)] = 1
    memory_gib: Annotated[float, Field(gt=0)]
    # Images a second that one device trains, by size (XL/2; 128x4 is 128 wide and 4 deep), `router`, or a stage's name.
    images_per_second: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    # For what is not in it: the peak of matrix products, by the device's name or as a number, and the share of it that is reached.
    device: str | None = None
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    mfu: Annotated[float, Field(gt=0, le=1)] = MFU
    # How fast a checkpoint is written to the run's directory.
    storage_mb_per_s: Annotated[float, Field(gt=0)]
    price_per_hour: Annotated[float, Field(ge=0)] = 0.0
    # Which cluster they are in, for people.
    cluster: str | None = None
    # How often one is taken away, on average; null: never. And whose notice is heeded.
    hours_between_preemptions: Annotated[float, Field(gt=0)] | None = None
    preemption: Literal["aws", "gcp", "azure"] | None = None
    # From the request to the first step, and again after each preemption: an assumption, not a measurement.
    start_seconds: Annotated[float, Field(ge=0)] = 300.0


class MachineTable(Strict):
    """What there is to train on."""

    machines: Annotated[tuple[Devices, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Training:
    """One training stage.

    Attributes:
        stage: its name.
        size: what :attr:`Devices.images_per_second` calls its like.
        images: its budget.
        flops: of one image, forward and backward.
        weights: numbers in its network.
        memory: bytes that it takes on each device.
        spec: its settings.
    """

    stage: str
    size: str
    images: int
    flops: int
    weights: int
    memory: int
    spec: TrainedConfig

    @property
    def workers(self) -> int:
        return self.spec.resources.num_workers

    @property
    def is_expert(self) -> bool:
        return self.stage.startswith("expert-")


def size_name(model: ModelConfig) -> str:
    """A size for people: its name, or width and depth."""
    return model.size or f"{model.hidden_size}x{model.num_layers}"


def trainings(config: RunConfig, sizes: Sequence[int], encoders: dict[str, Any]) -> list[Training]:
    """The training stages of a run.

    Args:
        config: the run's.
        sizes: train rows of each expert.
        encoders: the content of ``RUN/encoders/encoders.json``.
    """
    inputs, found = Inputs.of(encoders), []
    for line in cost.estimate(config, sizes, encoders)["stages"][:-1]:
        expert = config.experts[int(line["stage"].removeprefix("expert-"))]
        weights, image = memory.expert_weights(expert.model, inputs), memory.expert_activations(expert.model, inputs, expert.train)
        found.append(_training(line["stage"], size_name(expert.model), expert, line, weights, image))
    routers = {"router": config.router}
    if config.evaluation.control_router:
        routers[stages.CONTROL_ROUTER] = config.router.model_copy(update={"text": "none"})
    for name, router in routers.items():
        line = cost.estimate(config.model_copy(update={"router": router}), sizes, encoders)["stages"][-1]
        reads = inputs if router.text == "pooled" else replace(inputs, text_width=0)
        weights, image = memory.router_weights(router.model, reads, config.num_experts), memory.router_activations(router.model, reads, router.train)
        found.append(_training(name, "router", router, line, weights, image))
    return found


def _training(stage: str, size: str, spec: TrainedConfig, line: dict[str, Any], weights: int, image: int) -> Training:
    needs = memory.fixed_bytes(weights, spec.train, spec.resources.num_workers, host=spec.resources.gpus == 0) + _rows(spec) * image
    return Training(stage, size, line["images"], line["flops_per_image"], weights, needs, spec)


def _rows(spec: TrainedConfig) -> int:
    """Rows in one pass; where they are measured from memory, what fits at all."""
    if spec.train.micro_batch == "auto":
        return 1
    return spec.train.micro_batch or spec.train.batch_size // spec.resources.num_workers


@dataclass(frozen=True)
class Fit:
    """A training on a kind of machine.

    Attributes:
        rate: images a second of all its workers.
        checkpoint: seconds until a checkpoint is written.
        goodput: expected, with the checkpoints that the config asks for.
        hours: from its start to its end.
        loses_nothing: whether a preemption is announced early enough for a checkpoint; then it is counted as heeded.
        checkpoint_images: Young's interval, in images; ``None`` where machines stay.
        best_goodput: expected with that.
    """

    rate: float
    checkpoint: float
    goodput: float
    hours: float
    loses_nothing: bool
    checkpoint_images: int | None
    best_goodput: float


def fit(one: Training, machine: Devices) -> Fit | None:
    """What a training takes on a kind of machine; ``None`` if its memory is too small.

    Several workers are counted as so many times faster, and as taken away so many times as often.

    Raises:
        ConfigError: the table does not tell how fast it is there.
    """
    if one.memory > USABLE * machine.memory_gib * 2**30:
        return None
    rate = _rate(one, machine) * one.workers
    write = memory.CHECKPOINT_BYTES * one.weights / (machine.storage_mb_per_s * 1e6)
    between = None if machine.hours_between_preemptions is None else 3600 * machine.hours_between_preemptions / one.workers
    step = one.spec.train.batch_size / rate
    spared = machine.preemption is not None and preemption.loses_nothing(machine.preemption, write, one.workers, step)

    def share(images: int) -> float:
        if spared:
            return goodput_with_notice(write, machine.start_seconds, between)
        # One that is due while another is written is left out.
        return goodput(max(write, min(one.images, images) / rate), write, machine.start_seconds, between)

    expected = best = share(one.spec.train.checkpoint_images or one.images)
    images = None
    if between is not None:
        batch = one.spec.train.batch_size
        images = max(1, math.ceil(best_interval(write, between) * rate / batch)) * batch
        best = share(images)
    hours = (machine.start_seconds + one.images / rate / expected) / 3600
    return Fit(rate, write, expected, hours, spared, images, best)


def _rate(one: Training, machine: Devices) -> float:
    for key in (one.stage, one.size):
        if key in machine.images_per_second:
            return machine.images_per_second[key]
    peak = machine.peak_tflops or PEAK_TFLOPS.get(machine.device or "")
    if peak is None:
        raise ConfigError(
            f"machines.{machine.name}: images_per_second has neither {one.size!r} nor {one.stage!r}, and there is no peak to estimate it from; give "
            f"one of these, peak_tflops, or as device one of {', '.join(PEAK_TFLOPS)}"
        )
    return peak * 1e12 * machine.mfu / one.flops


@dataclass(frozen=True)
class Plan:
    """Trainings on machines.

    Attributes:
        trainings: what is trained.
        machines: on what.
        fits: of each training, on the kind of machine that it is placed on.
        placement: where, when, for how much.
    """

    trainings: list[Training]
    machines: tuple[Devices, ...]
    fits: list[Fit]
    placement: Placement

    @property
    def critical(self) -> str:
        """The expert that ends last."""
        ends = [(spot.ends, one.stage) for one, spot in zip(self.trainings, self.placement.spots, strict=True) if one.is_expert]
        return max(ends, key=lambda end: end[0])[1]


def make(found: Sequence[Training], machines: Sequence[Devices]) -> Plan:
    """Place trainings on machines; see :func:`paris_ray.training.placement.place`.

    Raises:
        ConfigError: a training fits on no machine, or nobody knows how fast it is.
    """
    table = [[fit(one, machine) for machine in machines] for one in found]
    for one, row in zip(found, table, strict=True):
        if not any(there and one.workers <= machine.count for there, machine in zip(row, machines, strict=True)):
            had = ", ".join(f"{machine.name}: {machine.count} × {USABLE * machine.memory_gib:.1f}" for machine in machines)
            raise ConfigError(
                f"{one.stage}: takes {one.workers} × {one.memory / 2**30:.1f} GiB, and no machine has that (usable: {had}); set its "
                f"train.micro_batch to auto or lower it (now {one.spec.train.micro_batch}), set train.gradient_checkpointing, or add machines"
            )
    hours = [[None if there is None else there.hours for there in row] for row in table]
    counts, prices = [machine.count for machine in machines], [machine.price_per_hour for machine in machines]
    placement = place(hours, [one.workers for one in found], counts, prices)
    fits = [row[spot.kind] for row, spot in zip(table, placement.spots, strict=True)]
    return Plan(list(found), tuple(machines), [one for one in fits if one is not None], placement)


def equal_hours(plan: Plan) -> dict[str, int]:
    """Budgets with which the experts end together where they are placed, by stage.

    The rule: an expert gets images in proportion to the speed at which it is trained there (images a second, times goodput, over the number of
    experts that take turns on its devices). Their sum stays what it was, but for whole batches; routers keep theirs.
    """
    experts = [i for i, one in enumerate(plan.trainings) if one.is_expert]
    where = {i: {(plan.placement.spots[i].kind, d) for d in plan.placement.spots[i].devices} for i in experts}
    speed = {}
    for i in experts:
        turns = sum(bool(where[i] & where[other]) for other in experts)
        speed[i] = plan.fits[i].rate * plan.fits[i].goodput / turns
    total = sum(plan.trainings[i].images for i in experts)
    budgets = {}
    for i in experts:
        batch, share = plan.trainings[i].spec.train.batch_size, speed[i] / sum(speed.values())
        budgets[plan.trainings[i].stage] = max(1, round(total * share / batch)) * batch
    return budgets
