"""How fast this machine trains the run's own networks, by a few seconds of the loop, and how fast it writes their checkpoints."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch

from paris_ray.config import ConfigError, RunConfig
from paris_ray.inference.residency import free_memory
from paris_ray.stages import expert_name
from paris_ray.storage import Folder
from paris_ray.training import checkpoint, memory, micro_batch, worker
from paris_ray.training.loop import Loop, Place
from paris_ray.training.plan import Devices, size_name

WARM = 3
"""Steps before the clock starts: compilation, the optimiser's state, the allocator."""

LEAST = 4
"""Steps between two looks at the clock, for which a GPU has to be waited for."""

SECONDS = 5.0


class _Enough(Exception):
    """The measurement is over."""


def this_machine(config: RunConfig) -> Devices:
    """Measure this machine: each size of expert, and the router, one after the other.

    As many trainings are assumed at once as it has GPUs or CPUs for (and ``max_parallel`` allows), each as fast as alone; those that share a GPU
    share its speed.

    Raises:
        ConfigError: a stage wants a GPU, and there is none.
        FileNotFoundError: shards or encoders are not there.
    """
    stages = {size_name(config.experts[k].model): expert_name(k) for k in reversed(range(config.num_experts))} | {"router": "router"}
    found = {size: measure(config, stage) for size, stage in stages.items()}
    asked = config.expert.resources
    if asked.gpus:
        name, count = torch.cuda.get_device_name(0), max(1, int(torch.cuda.device_count() / asked.gpus))
        room = torch.cuda.get_device_properties(0).total_memory * min(1.0, asked.gpus)
    else:
        name, count = "cpu", max(1, int((os.cpu_count() or 1) / asked.cpus))
        room = free_memory(torch.device("cpu")) / count
    count = min(count, config.max_parallel)
    return Devices(
        name="here",
        device=name,
        count=count,
        memory_gib=round(room / 2**30, 2),
        images_per_second={size: one.images_per_second for size, one in found.items()},
        storage_mb_per_s=min(one.storage_mb_per_s for one in found.values()),
        start_seconds=max(one.start_seconds for one in found.values()),
    )


@dataclass(frozen=True)
class Measured:
    """What a stage does here.

    Attributes:
        images_per_second: of one worker's loop on its share of a device.
        storage_mb_per_s: at which its checkpoints are written.
        start_seconds: until the first steps are over: reading rows, making networks, compiling.
    """

    images_per_second: float
    storage_mb_per_s: float
    start_seconds: float


def measure(config: RunConfig, stage: str) -> Measured:
    """Train a stage for some seconds; nothing stays in the run's directory.

    The loop is the one that trains, on the stage's own rows and settings: drawing, forward, backward, clipping, optimiser, average.
    """
    entered, asked = time.perf_counter(), worker.resources(config, stage)
    if asked.gpus and not torch.cuda.is_available():
        raise ConfigError(f"{stage}: resources.gpus is {asked.gpus:g}, and this machine has no GPU to measure; describe the machines with --machines")
    # Of a rank that reports nothing: a start from others' weights would be written down.
    place = Place(torch.device("cuda", 0) if asked.gpus else torch.device("cpu"))
    task = worker.set_up(config, stage, Place(place.device, rank=1))
    train = task.spec.train
    share = train.batch_size // asked.num_workers
    rows = micro_batch.largest(task, train, share, place) if train.micro_batch == "auto" else train.micro_batch or share
    endless: dict[str, Any] = {"micro_batch": rows, "images": 10**9, "checkpoint_images": None, "sample_images": None, "log_images": 10**9}
    steps, began, images_per_second = 0, 0.0, 0.0

    def on_step(images: int, line: dict[str, Any] | None) -> None:
        nonlocal steps, began, images_per_second
        steps += 1
        if steps < WARM or (steps - WARM) % LEAST:
            return
        if place.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if steps == WARM:
            began = now
        elif now - began >= SECONDS:
            images_per_second = (steps - WARM) * train.batch_size / (now - began) * min(1.0, asked.gpus or 1.0)
            raise _Enough

    with tempfile.TemporaryDirectory() as scratch:
        loop = Loop(task, train.model_copy(update=endless), config.seed, Folder(scratch), place, on_step=on_step)
        try:
            loop.run()
        except _Enough:
            pass
    seconds = checkpoint.write_seconds(Folder(config.run_dir), loop.ema.weights)
    written = memory.CHECKPOINT_BYTES * sum(p.numel() for p in task.model.parameters())
    print(f"{stage}: {images_per_second:.1f} images/s, a checkpoint in {seconds:.1f} s", flush=True)
    return Measured(round(images_per_second, 2), round(written / 1e6 / seconds, 2), round(began - entered, 1))
