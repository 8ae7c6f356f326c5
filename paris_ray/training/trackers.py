"""The metrics lines of a training, also in TensorBoard, MLflow or Weights & Biases; the files in the run's directory are written in any case.

Each takes its settings (server, key, project folder) from the environment, as its own documentation says. Imports none of them until it is asked to.
"""

from __future__ import annotations

import hashlib
import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

from paris_ray import stages
from paris_ray.config import ConfigError, RunConfig
from paris_ray.storage import Folder

CLOSE_S = 10.0
"""How long the end of a training waits for what a tracker has not taken yet."""


class Tracker(Protocol):
    """What takes figures."""

    def log(self, images: int, figures: dict[str, float]) -> None:
        """Figures at a number of images."""
        ...

    def close(self) -> None:
        """There will be no more."""
        ...


class TensorBoard:
    """Event files in ``RUN/tensorboard/STAGE``; points past the one where training goes on are hidden."""

    def __init__(self, config: RunConfig, stage: str, images: int):
        from tensorboardX import SummaryWriter

        folder, own = f"{Folder(config.run_dir).path}/tensorboard/{stage}", f".{time.time_ns()}"  # else a start in the same second has the same file
        self.writer = SummaryWriter(folder, purge_step=images + 1, filename_suffix=own)

    def log(self, images: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, images)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class MLflow:
    """A run for each stage, in the experiment of the run's name; a stage that goes on continues its own."""

    def __init__(self, config: RunConfig, stage: str, images: int):
        from mlflow import MlflowClient

        self.client = MlflowClient()
        found = self.client.get_experiment_by_name(config.name)
        experiment = self.client.create_experiment(config.name) if found is None else found.experiment_id
        tags = {"paris_ray.run": Folder(config.run_dir).uri, "paris_ray.stage": stage}
        filter_string = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        before = self.client.search_runs([experiment], filter_string)
        run = before[0] if before else self.client.create_run(experiment, tags=tags, run_name=stage)
        self.run = run.info.run_id
        self.client.update_run(self.run, "RUNNING")

    def log(self, images: int, figures: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.run, [Metric(name, value, now, images) for name, value in figures.items()])

    def close(self) -> None:
        self.client.set_terminated(self.run)


class WandB:
    """A run for each stage, in the project of the run's name; a stage that goes on continues its own.

    Of the config others get what decides the stage's result: no addresses, no paths.
    """

    def __init__(self, config: RunConfig, stage: str, images: int):
        import wandb

        own = hashlib.sha256(f"{Folder(config.run_dir).uri} {stage}".encode()).hexdigest()[:16]
        self.run = wandb.init(project=config.name, name=stage, id=own, resume="allow", config=stages.config_part(config, stage))
        # Its own steps may not go back, as images do after a restart.
        self.run.define_metric("*", step_metric="images")

    def log(self, images: int, figures: dict[str, float]) -> None:
        self.run.log({"images": images, **figures})

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, tuple[str, Callable[[RunConfig, str, int], Tracker]]] = {
    "tensorboard": ("tensorboardX", TensorBoard),
    "mlflow": ("mlflow", MLflow),
    "wandb": ("wandb", WandB),
}
"""The package of each, and what makes it for a stage that goes on at so many images."""


def check(config: RunConfig) -> None:
    """Raise ConfigError unless all that a run asks for can be used."""
    for name in config.tracking:
        package, _ = TRACKERS[name]
        if importlib.util.find_spec(package) is None:
            remedy = "tensorboardX" if name == "tensorboard" else f"'paris_ray[{name}]'"
            raise ConfigError(f"tracking: {name} needs the package {package}, which is not installed; pip install {remedy}, or leave {name} out")
        if name == "tensorboard" and not Folder(config.run_dir).is_local:
            raise ConfigError(
                f"tracking: tensorboard writes files that grow, which {config.run_dir} cannot hold; take mlflow or wandb, or a run_dir on a disk"
            )


def figures(line: dict[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a metrics line by name, such as ``loss``, ``loss_by_time/0``, ``without_text/ece_by_time/0``."""
    for name, value in line.items():
        if isinstance(value, dict):
            yield from figures(value, f"{above}{name}/")
        elif isinstance(value, list):
            yield from figures({str(i): one for i, one in enumerate(value)}, f"{above}{name}/")
        elif isinstance(value, int | float) and name != "images":
            yield f"{above}{name}", float(value)


class Trackers:
    """Hands the metrics lines of one stage on, in a thread of its own. One that fails is said once, and training goes on.

    Args:
        config: the run's.
        stage: which is trained.
        images: where it goes on.
    """

    def __init__(self, config: RunConfig, stage: str, images: int):
        self._config, self._stage, self._images = config, stage, images
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._open: dict[str, Tracker] = {}
        self._failed: set[str] = set()
        self._thread = threading.Thread(target=self._run, daemon=True, name="trackers")

    def __enter__(self) -> Trackers:
        if self._config.tracking:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._config.tracking:
            self._lines.put(None)
            self._thread.join(CLOSE_S)

    def __call__(self, line: dict[str, Any]) -> None:
        """Take a metrics line."""
        if self._config.tracking:
            self._lines.put(dict(line))

    def _run(self) -> None:
        for name in self._config.tracking:
            self._try(name, partial(self._make, name))
        while (line := self._lines.get()) is not None:
            found = dict(figures(line))
            for opened, one in self._open.items():
                self._try(opened, partial(one.log, line["images"], found))
        for opened, one in self._open.items():
            self._try(opened, one.close)

    def _make(self, name: str) -> None:
        _, make = TRACKERS[name]
        self._open[name] = make(self._config, self._stage, self._images)

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, it is not the training's
            if name not in self._failed:
                print(f"{self._stage}: {name} takes no metrics: {type(error).__name__}: {error}; training goes on without it", flush=True)
            self._failed.add(name)
