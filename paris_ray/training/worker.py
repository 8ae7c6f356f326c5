"""One training worker: where it runs, what it trains, what it reports. Imports torch only when it runs, so that drivers stay light."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from paris_ray import config as configs
from paris_ray.config import ConfigError, Resources, RunConfig, TrainConfig
from paris_ray.progress import Progress
from paris_ray.stages import CONTROL_ROUTER
from paris_ray.storage import Folder

if TYPE_CHECKING:
    import torch
    from torch import nn

    from paris_ray.training.expert_task import ExpertTask
    from paris_ray.training.loop import Place
    from paris_ray.training.preemption import Notice
    from paris_ray.training.router_task import RouterTask

ATTEMPTS = "_attempts.json"


def resources(config: RunConfig, stage: str) -> Resources:
    """What a training stage asks the cluster for."""
    return config.experts[int(stage.removeprefix("expert-"))].resources if stage.startswith("expert-") else config.router.resources


def work(payload: dict[str, Any]) -> dict[str, Any]:
    """The function that Ray Train runs on each worker.

    Args:
        payload: ``config`` (the run's config as JSON) and ``stage``.

    Returns:
        ``{"counts": …}``, ``{"failure": message}`` for an error that would only happen again if the worker were restarted, or
        ``{"stopped": message}`` for a training that was asked to stop.
    """
    import ray.train

    from paris_ray.training.loop import NonFiniteError, Place
    from paris_ray.training.micro_batch import MemoryShortError

    config, stage = configs.build(payload["config"]), payload["stage"]
    context = ray.train.get_context()
    from paris_ray.training import termination
    from paris_ray.training.preemption import Watcher
    from paris_ray.training.stopping import CHECKPOINT_S, Listener

    asked = resources(config, stage)
    place = Place(_device(asked, context.get_world_size()), context.get_world_rank(), context.get_world_size())
    stop = Listener(Folder(config.run_dir) / "events", stage, lambda: termination.ask(CHECKPOINT_S))
    try:
        with stop, Watcher(asked.preemption, _leave) if asked.preemption else contextlib.nullcontext():
            return {"counts": run(config, stage, place, lambda line: ray.train.report({k: v for k, v in line.items() if isinstance(v, int | float)}))}
    except (NonFiniteError, MemoryShortError, ConfigError) as error:
        return {"failure": str(error)}
    except termination.TerminatedError as went:
        if stop.wished():
            return {"stopped": str(went)}
        print(went, flush=True)
        os._exit(termination.EXIT_CODE)  # to Ray Train the worker has died, and it starts another where there is room


def _leave(notice: Notice) -> None:
    """The machine will be taken away: let nothing new come to this node, then ask the training to go."""
    import ray
    from ray.core.generated import autoscaler_pb2

    from paris_ray.training import termination

    print(f"{notice.text}, in {notice.seconds:.0f} s; a checkpoint is written, and training goes on elsewhere", flush=True)
    context, gone = ray.get_runtime_context(), time.time() + notice.seconds
    try:
        deadline = int(1000 * gone)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = ray._raylet.GcsClient(address=context.gcs_address).drain_node(context.get_node_id(), reason, notice.text, deadline)
        if not accepted:
            print(f"Ray does not drain this node: {why}", flush=True)
    except Exception as error:  # what matters is the checkpoint
        print(f"this node could not be drained: {type(error).__name__}: {error}", flush=True)
    termination.ask(gone - time.time())


def _device(asked: Resources, world: int) -> torch.device:
    import torch

    if asked.gpus == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(f"resources.gpus is {asked.gpus:g}, but torch {torch.__version__} finds no GPU on this node; check its image and drivers")
    if world == 1:
        return torch.device("cuda", 0)
    import ray.train.torch

    device: torch.device = ray.train.torch.get_device()
    torch.cuda.set_device(device)
    return device


def run(
    config: RunConfig,
    stage: str,
    place: Place,
    report: Callable[[dict[str, Any]], None] = lambda line: None,
    teacher: Folder | None = None,
) -> dict[str, Any]:
    """Train one stage in this process, to the end and with its export; the same command again resumes.

    Reads ``shards/expert=K`` of its expert (the router: of all) and ``encoders/``; writes its own stage folder and its event.

    Args:
        config: the run's config.
        stage: ``expert-K``, ``router`` or ``control_router``.
        place: device, rank and number of workers.
        report: called after each checkpoint with the last metrics line; on all workers.
        teacher: an assembled model whose velocity an expert learns (:mod:`paris_ray.training.student_task`); ``None``: the data's.

    Returns:
        figures for the manifest: images, seconds, images_per_second, loss, validation_loss, rows, restarts.
    """
    from paris_ray.training import micro_batch, termination
    from paris_ray.training.loop import Loop
    from paris_ray.training.trackers import Trackers

    asked = resources(config, stage)
    task = set_up(config, stage, place, teacher)
    attempts = _count_attempt(task.folder) if place.rank == 0 else 1
    train = micro_batch.settle(task, place)
    model = _wrap(task.model, place)
    loop = Loop(
        task, train, config.seed, task.folder, place, model,
        on_checkpoint=report, asked_to_go=termination.asked, seconds_left=termination.seconds_left,
    )  # fmt: skip
    tracked = Trackers(config, stage, loop.images)
    if place.rank == 0:
        progress = Progress(Folder(config.run_dir) / "events", stage, loop.total)
        note = f"restart {attempts - 1}, from image {loop.images}" if attempts > 1 else ""
        progress.update(loop.images, message=note, force=True)

        def on_step(images: int, line: dict[str, Any] | None) -> None:
            progress.update(images, line["loss"] if line else None)
            if line:
                tracked(line)

        loop.on_step = on_step
        if asked.preemption:
            print(f"{stage}: {_what_preemption_costs(asked, train, task.folder, loop.ema.weights)}", flush=True)
    with tracked if place.rank == 0 else contextlib.nullcontext(), termination.training(), micro_batch.out_of_memory_explained(task, train, place):
        last = loop.run()
    if place.rank == 0:
        task.export(loop.ema.weights)
    return {
        "images": loop.images,
        "seconds": round(loop.seconds, 3),
        "images_per_second": round(loop.images / loop.seconds, 1) if loop.seconds else None,
        "loss": last["loss"],
        "validation_loss": last.get("validation_loss"),
        **{name: last[name] for name in ("accuracy", "ece") if name in last},
        **({"mfu": round(mfu, 4)} if loop.seconds and (mfu := loop.mfu(loop.images / loop.seconds)) else {}),
        "rows": task.rows,
        "restarts": attempts - 1,
    }


def set_up(config: RunConfig, stage: str, place: Place, teacher: Folder | None = None) -> ExpertTask | RouterTask:
    """What a stage trains, in a process that is prepared for it."""
    _prepare_process(resources(config, stage).threads, place)
    task = _task(config, stage, place.device, place.rank, teacher)
    _prepare_network(task.model, task.spec.train)
    return task


def _what_preemption_costs(asked: Resources, train: TrainConfig, folder: Folder, weights: dict[str, torch.Tensor]) -> str:
    """Whether the grace after a cloud's notice is enough for a checkpoint, by a measurement."""
    from paris_ray.training import checkpoint
    from paris_ray.training.preemption import GRACE_S, loses_nothing

    assert asked.preemption is not None
    every = f"the interval of {train.checkpoint_images} images" if train.checkpoint_images else "nothing: set train.checkpoint_images"
    try:
        seconds = checkpoint.write_seconds(folder, weights)
    except OSError as error:
        return f"how long a checkpoint takes could not be measured ({error}); what a preemption loses is bounded by {every}"
    said = f"a checkpoint takes {seconds:.1f} s, {asked.preemption} gives {GRACE_S[asked.preemption]:.0f} s"
    if loses_nothing(asked.preemption, seconds, asked.num_workers):
        return f"{said}: outside validation a preemption loses nothing"
    return f"{said}{' and several workers must agree to go' if asked.num_workers > 1 else ''}: what a preemption loses is bounded by {every}"


def _prepare_process(threads: int, place: Place) -> None:
    """Threads, denormals and determinism: what "the same bits" depends on."""
    import torch

    torch.set_num_threads(threads)
    # Denormal numbers, which Adam's moments reach, cost a CPU up to a hundred times a normal one.
    torch.set_flush_denormal(True)
    if place.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        # Else it would also fill every new tensor, which costs and only guards against reading what was never written.
        torch.utils.deterministic.fill_uninitialized_memory = False
    else:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _task(config: RunConfig, stage: str, device: torch.device, rank: int = 0, teacher: Folder | None = None) -> ExpertTask | RouterTask:
    if stage.startswith("expert-"):
        from paris_ray.training.expert_task import ExpertTask

        k = int(stage.removeprefix("expert-"))
        if teacher is None:
            return ExpertTask(config, k, device, rank)
        from paris_ray.training.student_task import StudentTask

        return StudentTask(config, k, device, rank, teacher)
    from paris_ray.training.router_task import RouterTask

    return RouterTask(config, device, control=stage == CONTROL_ROUTER)


def _prepare_network(model: nn.Module, train: TrainConfig) -> None:
    """Switch on what costs or saves time and memory in its blocks."""
    model.gradient_checkpointing = train.gradient_checkpointing  # type: ignore[assignment]
    if train.compile:
        model.compile_blocks()  # type: ignore[operator]


def _wrap(model: nn.Module, place: Place) -> nn.Module:
    """The model as the forward pass calls it: several workers of one stage average their gradients."""
    if place.world == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel

    # The networks' buffers are constants.
    devices = [place.device] if place.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


def _count_attempt(folder: Folder) -> int:
    """Count this start of the stage's worker; for people to read, nothing depends on it."""
    try:
        attempts = int(folder.read_json(ATTEMPTS)["attempts"]) + 1
    except FileNotFoundError:
        attempts = 1
    folder.write_json(ATTEMPTS, {"attempts": attempts})
    return attempts
