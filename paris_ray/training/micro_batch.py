"""``train.micro_batch: auto``: as many rows at once as the memory takes, found when a stage first starts and kept in its folder.

Sums of other rows have other last bits, so a resume takes the number that is there, on whatever device it goes on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

from paris_ray.config import ConfigError, Resources, TrainConfig
from paris_ray.inference.residency import free_memory
from paris_ray.training import memory
from paris_ray.training.budget import Inputs
from paris_ray.training.draws import Draws

if TYPE_CHECKING:
    from paris_ray.training.expert_task import ExpertTask
    from paris_ray.training.loop import Place
    from paris_ray.training.router_task import RouterTask

    Trained = ExpertTask | RouterTask

FILE = "micro_batch.json"

USABLE = 0.9
"""Share of the free memory that is taken; the rest is for what fragments and for libraries."""


class MemoryShortError(RuntimeError):
    """The device's memory does not take the rows at once that the stage is trained with."""


def settle(task: Trained, place: Place) -> TrainConfig:
    """The stage's training with a number, or null, for its micro-batch: what the config says, or for ``auto`` what was found at the first start.

    Raises:
        ConfigError: not even one row fits, or the number does not divide a worker's share of the batch.
    """
    train: TrainConfig = task.spec.train
    if train.micro_batch != "auto":
        return train
    rows = _agreed(place, _frozen(task)["micro_batch"] if place.rank == 0 and _frozen(task) else 0, max)
    share = train.batch_size // place.world
    if not rows:
        rows = _agreed(place, largest(task, train, share, place), min)
        if place.rank == 0:
            task.folder.write_json(FILE, {"micro_batch": rows, "workers": place.world, **_device(place.device)})
            print(f"{task.stage}: {rows} rows at once (train.micro_batch), as the memory takes; kept from now on", flush=True)
    if share % rows:
        raise ConfigError(
            f"{task.stage}: its micro-batch, found at its first start, is {rows}, which does not divide the {share} rows of a worker's share; take "
            f"resources.num_workers so that it does (it was {_frozen(task).get('workers')}), or train it anew with --rebuild {task.stage}"
        )
    task.rows_at_once = rows
    return train.model_copy(update={"micro_batch": rows})


def largest(task: Trained, train: TrainConfig, share: int, place: Place) -> int:
    """The largest divisor of a worker's share that fits: on a GPU tried, on a CPU by a bound on activations.

    Raises:
        ConfigError: not even one row fits.
    """
    if place.device.type == "cuda":
        limit = USABLE * (free_memory(place.device) + torch.cuda.memory_allocated(place.device)) * min(1.0, task.spec.resources.gpus)
        try:
            return _largest(task.stage, share, limit, lambda rows: _tried(task, train, rows, place.device))
        finally:
            if train.compile:  # of unlike batches it makes code for any; a resume, which tries none, has it for one
                torch.compiler.reset()
    weights = sum(p.numel() for p in task.model.parameters())
    fixed = memory.fixed_bytes(weights, train, task.spec.resources.num_workers, host=True) - 4 * weights  # which are there already
    image = image_bytes(task, train)
    return _largest(task.stage, share, USABLE * free_memory(place.device) * _node_share(task.spec.resources), lambda rows: fixed + rows * image)


def _largest(stage: str, share: int, limit: float, needs: Callable[[int], float]) -> int:
    found = 0
    for rows in (n for n in range(1, share + 1) if share % n == 0):
        try:
            need = needs(rows)
        except torch.OutOfMemoryError:
            need = float("inf")
        if need > limit:
            break
        found = rows
    if found == 0:
        raise ConfigError(
            f"{stage}: not even one row fits the {limit / 2**30:.1f} GiB that can be used here (train.micro_batch: auto); set "
            "train.gradient_checkpointing, or train it on a machine with more memory"
        )
    return found


def _node_share(asked: Resources) -> float:
    """The part of a node's memory that is this worker's: as many as the node has CPUs for may be on it."""
    return min(1.0, asked.cpus / (os.cpu_count() or 1))


def image_bytes(task: Trained, train: TrainConfig) -> int:
    """The bound on what one row takes."""
    count = memory.expert_activations if task.stage.startswith("expert-") else memory.router_activations
    return count(task.spec.model, Inputs.of(task.encoders.meta), train)


def _tried(task: Trained, train: TrainConfig, rows: int, device: torch.device) -> float:
    """Bytes at the peak of a forward and backward pass of so many rows, with room for what is not there yet: moments, average, buckets."""
    more = 3 + (task.spec.resources.num_workers > 1)
    held = [torch.empty_like(p) for p in task.model.parameters() for _ in range(more)]
    drawn = Draws(0, task.stage, task.rows, task.shape, task.dropout)(0, rows)
    try:
        for _ in range(2):  # the second adds to gradients that are there
            torch.cuda.reset_peak_memory_stats(device)
            batch = {name: tensor.to(device) for name, tensor in task.batch(drawn).items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
                losses, _ = task.losses(task.model, batch)
            losses.sum().backward()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device))
    finally:
        held.clear()
        task.model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def _frozen(task: Trained) -> dict[str, Any]:
    """What was found at the first start; empty before."""
    try:
        return dict(task.folder.read_json(FILE))
    except FileNotFoundError:
        return {}


def _agreed(place: Place, number: int, how: Callable[[int, int], int]) -> int:
    """The least or greatest number of all workers."""
    if place.world == 1:
        return number
    one = torch.tensor(number, device=place.device)
    torch.distributed.all_reduce(one, torch.distributed.ReduceOp.MAX if how is max else torch.distributed.ReduceOp.MIN)
    return int(one.item())


def _device(device: torch.device) -> dict[str, Any]:
    """What it was found on, for people."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return {"device": about.name, "memory_gib": round(about.total_memory / 2**30, 1)}
    return {"device": "cpu", "memory_gib": round(free_memory(device) / 2**30, 1)}


@contextlib.contextmanager
def out_of_memory_explained(task: Trained, train: TrainConfig, place: Place) -> Iterator[None]:
    """Turn a device's error for too little memory into one that says what it means here. Raises MemoryShortError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)):
            raise
        here, then = _device(place.device), _frozen(task)
        rows = train.micro_batch or train.batch_size // place.world
        found = f" It was found at the first start, on {then['device']} with {then['memory_gib']} GiB." if then else ""
        raise MemoryShortError(
            f"{task.stage}: memory ran out on {here['device']} with {here['memory_gib']} GiB, at {rows} rows at once (train.micro_batch).{found} It "
            "stays what it is, because another would change the weights' bits. Go on where there is as much memory as before, or set "
            "train.gradient_checkpointing, which takes far less and changes no bit; or train anew with fewer rows, "
            f"--rebuild {task.stage} and train.micro_batch={max(1, int(rows) // 2)}."
        ) from error
