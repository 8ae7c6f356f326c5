"""From a training stage to Ray Train and back to a published folder. The driver's side: imports neither torch nor, until it is called, Ray."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from typing import Any

from paris_ray.config import RunConfig
from paris_ray.progress import Progress, counted
from paris_ray.stages import stage as find_stage
from paris_ray.storage import Folder
from paris_ray.training import trackers
from paris_ray.training.machines import Machines
from paris_ray.training.stopping import StoppedError, withdraw
from paris_ray.training.termination import listen
from paris_ray.training.wall import Wall, last_sign
from paris_ray.training.worker import resources, work

START_TIMEOUT_S = "1200"
"""Seconds a worker group waits for its resources before Ray Train asks for them anew; its 60 are too few for a node that must boot first."""


class TrainingError(RuntimeError):
    """Training stopped for a reason that another try would not change."""


def train_stage(config: RunConfig, name: str) -> dict[str, Any]:
    """Train one stage on the cluster and publish its folder; a finished one is left as it is, an unfinished one goes on where it was.

    Args:
        config: the run's config.
        name: ``expert-K``, ``router`` or ``control_router``.

    Returns:
        the stage's manifest.

    Raises:
        ConfigError: a package that ``tracking`` needs is not installed.
        StaleError: the folder was made from other inputs.
        FileNotFoundError: a parent is missing.
        TrainingError: a loss or gradient was not finite, or the shard is empty.
        StoppedError: it was asked to stop (:mod:`paris_ray.training.stopping`).
    """
    started = time.monotonic()
    trackers.check(config)
    stage = find_stage(config, name)
    status = stage.begin()
    if status.manifest is not None and status.state == "valid":
        print(f"{name}: done already, nothing to do", flush=True)
        return status.manifest
    events = Folder(config.run_dir) / "events"
    last = last_sign(events, name)  # of a driver before this one, until the next line
    withdraw(events, name)
    progress, wall = Progress(events, name, 0), Wall(stage.folder, last)
    try:
        with wall, Machines(events, name, resources(config, name)):
            answer = _fit(config, name)
        if "failure" in answer:
            raise TrainingError(answer["failure"])
        if "stopped" in answer:
            raise StoppedError(answer["stopped"])
        counts = answer["counts"]
        counts["goodput"] = round(counts["seconds"] / wall.seconds, 4)
        manifest = stage.publish(counts, time.monotonic() - started, result="export/")
    except BaseException as error:
        with contextlib.suppress(OSError, ValueError):  # nothing about progress may hide the error itself
            seen = events.read_json(f"{name}.json")
            progress.done, progress.total, progress.loss = seen["done"], seen["total"], seen["loss"]
        progress.fail(_in_a_line(error))
        raise
    counts = manifest["counts"]
    progress.done = progress.total = counts["images"]
    progress.loss = counts["loss"]
    rate = counts["images_per_second"]  # unknown when the last attempt had nothing left to train
    mfu = f" at {counts['mfu']:.0%} MFU" if "mfu" in counts else ""
    said = [*([f"{rate} images/s{mfu}"] if rate else []), counted(counts["restarts"], "restart"), f"{counts['goodput']:.0%} of the time in steps"]
    progress.finish(", ".join(said))
    return manifest


def _in_a_line(error: BaseException) -> str:
    """An error for people who follow the run; the whole of it goes to the log."""
    if not isinstance(error, Exception):
        return "stopped from outside; the same command goes on from the last checkpoint"
    lines = str(error).strip().splitlines()
    return lines[-1][:300] if lines else type(error).__name__


def _fit(config: RunConfig, name: str) -> dict[str, Any]:
    """Run the worker function under Ray Train; returns what the worker of rank 0 returned."""
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_TIMEOUT_S)
    # Ray Train's own `print` writes a worker's line to the stream and logs it as well; both are forwarded here, so each line would come twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    import ray.train

    asked = resources(config, name)
    scaling = ray.train.ScalingConfig(
        num_workers=asked.num_workers,
        use_gpu=asked.gpus > 0,
        resources_per_worker={"CPU": asked.cpus, **({"GPU": asked.gpus} if asked.gpus else {}), **asked.custom},
        accelerator_type=asked.accelerator_type,
        label_selector=asked.labels or None,
    )
    # Our own checkpoints carry the state, so Ray's folder is fresh each time (the same name would make it resume) and goes when it is done with.
    scratch = Folder(config.run_dir) / ".ray" / name
    scratch.delete_all()  # what a killed driver left
    attempt = f"{name}-{uuid.uuid4().hex[:12]}"
    failures = ray.train.FailureConfig(max_failures=asked.max_failures)
    run_config = ray.train.RunConfig(name=attempt, storage_path=scratch.uri, failure_config=failures, callbacks=[_listening()])
    payload = {"config": config.model_dump(mode="json"), "stage": name}
    try:
        result = _trainer(asked.num_workers)(work, train_loop_config=payload, scaling_config=scaling, run_config=run_config).fit()
    finally:
        scratch.delete_all()
    answer: dict[str, Any] = result.return_value
    return answer


def _listening() -> Any:
    """A callback that lets the main thread of each worker take SIGTERM, before training starts in another."""
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class Listening(WorkerGroupCallback):  # type: ignore[misc]
        def after_worker_group_start(self, worker_group: Any) -> None:
            worker_group.execute(listen)

    return Listening()


def _trainer(num_workers: int) -> Any:
    """The trainer class.

    Several workers of one expert average their gradients in a process group, which TorchTrainer sets up. One worker has nobody to talk to; its plain
    base class does the rest and keeps torch out of the driver, where importing it costs 5 CPU seconds and 490 MB (measured, import alone).
    """
    if num_workers > 1:
        from ray.train.torch import TorchTrainer

        return TorchTrainer
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    return DataParallelTrainer
