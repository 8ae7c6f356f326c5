"""The one optimisation loop, for experts and routers, in plain torch.

Progress is counted in images. Step s trains on the samples [images, images + batch), whose rows, noises, times and caption drops are functions of
(seed, stage, sample number); of several workers each takes its slice. So after a resume the loop goes on as if nothing had happened: on the same
kind of device, with the same threads and versions, to the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from paris_ray.config import TrainConfig
from paris_ray.storage import Folder
from paris_ray.training import checkpoint
from paris_ray.training.budget import peak_flops, total_images
from paris_ray.training.draws import Draw, Draws
from paris_ray.training.ema import Ema
from paris_ray.training.feed import Batch, Clock, feed
from paris_ray.training.saver import CheckpointError, Saver
from paris_ray.training.termination import TerminatedError

TIME_BINS = 4
"""Losses are reported for this many equal intervals of time, from data to noise."""


class NonFiniteError(RuntimeError):
    """A loss or a gradient is not a number; no weight was updated with it."""


class BrokenRowsError(NonFiniteError):
    """What was read is no number either: no other setting would have helped."""


class Task(Protocol):
    """What is trained.

    Attributes:
        stage: the stage's name, which also names its random streams.
        model: the network, on the device.
        rows: rows of the training data.
        ids: of these rows.
        shape: shape of one sample's noise.
        dropout: probability that a caption is dropped.
        flops: operations of the network for one image, forward and backward.
    """

    stage: str
    model: nn.Module
    rows: int
    ids: list[str]
    shape: tuple[int, ...]
    dropout: float
    flops: int

    def batch(self, draw: Draw) -> Batch:
        """What the draws name, as tensors on the CPU. May be called from another thread."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss (n,) in float32 and time (n,) in [0, 1] of each sample, for a batch on the device."""
        ...

    def evaluate(self, images: int) -> dict[str, Any]:
        """Figures on rows that are not trained on; called while the model holds its averaged weights."""
        ...


@dataclass(frozen=True)
class Place:
    """Where the loop runs: the device, and which of how many workers this is."""

    device: torch.device
    rank: int = 0
    world: int = 1


def learning_rate(config: TrainConfig, images: int, total: int) -> float:
    """Learning rate of the step that ends at ``images``: linear warm-up, then constant or half a cosine to zero at ``total``."""
    if images < config.warmup_images:
        return config.learning_rate * images / config.warmup_images
    if config.schedule == "constant":
        return config.learning_rate
    # Of the step's first image, so that the last step still moves.
    done = (images - config.batch_size - config.warmup_images) / max(1, total - config.warmup_images)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))


def optimizer_for(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with decoupled decay, on matrices only: biases, norms, tables and tokens are not pulled to zero."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.ndim >= 2 and name.endswith("weight")]
    others = [p for name, p in named if not (p.ndim >= 2 and name.endswith("weight"))]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


class Loop:
    """Trains a task to its budget, from the newest checkpoint on.

    Args:
        task: what is trained.
        config: how.
        seed: the run's seed.
        folder: the stage's folder; checkpoints and metrics go below it.
        place: device, rank and number of workers.
        wrapped: the model as the forward pass calls it (DistributedDataParallel), if not the task's own.
        on_step: called after each step with (images, None), and at each metrics line with (images, line).
        on_checkpoint: called on every worker when a checkpoint is due, with the last metrics line.
        asked_to_go: whether the process was; then the loop ends after the step at hand with a checkpoint there. Several workers, who must agree, end
            at the next metrics line.
        seconds_left: for how long that checkpoint may be tried, once the process was asked; it is tried once at least.
        check_each_step: look for non-finite values at each step. On a GPU that would wait for the device; there the update itself is switched
            off on the device from the first such value on, and the loop stops at the next metrics line, which comes before any checkpoint.
    """

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        seed: int,
        folder: Folder,
        place: Place | None = None,
        wrapped: nn.Module | None = None,
        on_step: Callable[[int, dict[str, Any] | None], None] = lambda images, line: None,
        on_checkpoint: Callable[[dict[str, Any]], None] = lambda line: None,
        asked_to_go: Callable[[], bool] = lambda: False,
        seconds_left: Callable[[], float] = lambda: 0.0,
        check_each_step: bool | None = None,
    ):
        self.task, self.config, self.folder = task, config, folder
        self.place = place or Place(torch.device("cpu"))
        config.check_slices(self.place.world)
        self.on_step, self.on_checkpoint, self.asked_to_go, self.seconds_left = on_step, on_checkpoint, asked_to_go, seconds_left
        device = self.place.device
        self.check_each_step = device.type == "cpu" if check_each_step is None else check_each_step
        self.model = wrapped or task.model
        self.optimizer = optimizer_for(task.model, config)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.ema = Ema(task.model, config.ema_half_life_images)
        self.draws = Draws(seed, task.stage, task.rows, task.shape, task.dropout)
        self.total = total_images(config, task.rows)
        # Of bfloat16: other precisions have other peaks.
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" and config.precision == "bf16" else None
        self.images, self.seconds = 0, 0.0
        self.lines: list[dict[str, Any]] = []
        self._line: dict[str, Any] = {}
        # Sums of loss and counts by time bin, sum of gradient norms: kept on the device, read at metrics lines only. Last, how many workers must go.
        self._sums = torch.zeros(2 * TIME_BINS + 2, device=device)
        self._clock, self._going, self._saved = Clock(), False, -1
        self.saver = Saver(folder, config.keep_checkpoints)
        # 1 from the first non-finite value on; and the image it was seen at.
        self._broken = torch.zeros((), device=device)
        self._broken_at = torch.zeros((), device=device, dtype=torch.float64)
        self._resume()

    # -- state --------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        found = checkpoint.latest(self.folder)
        if self.place.rank == 0:
            checkpoint.forget_metrics_after(self.folder, found.images if found else 0)
        if found is None:
            return
        self.task.model.load_state_dict(found.tensors("model"))
        self.ema.load(found.tensors("ema"))
        self._load_optimizer(found.tensors("optimizer"))
        self.images, self.seconds, self._line = found.images, found.state["seconds"], found.state["line"]
        self._saved = self.images
        if begun := found.state.get("begun"):  # a checkpoint between two metrics lines
            self._sums.copy_(torch.tensor(begun["sums"]))
            self._clock.carry(begun["seconds"], begun["waited"])

    def _save(self, must: bool, begun: dict[str, Any] | None = None) -> None:
        """Write a checkpoint: soon, if the one before is written; or now, if it must be.

        Args:
            must: wait until it is written.
            begun: what has been measured since the last metrics line, if this is not one.
        """
        if self.place.rank != 0:
            self.lines = []
        elif must or self.saver.ready():
            tensors = {"model": dict(self.task.model.named_parameters()), "ema": self.ema.weights, "optimizer": self._optimizer_tensors()}
            state = {"seconds": self.seconds, "line": self._line, **({"begun": begun} if begun else {})}
            self.saver.save(self.images, tensors, state, self.lines)
            self.lines, self._saved = [], self.images
            if must:
                self.saver.wait()

    def _alone_and_asked(self) -> bool:
        return self.place.world == 1 and self.asked_to_go()

    def _go(self) -> None:
        """Leave a checkpoint here, and go; a store that fails is waited for no longer than there is time."""
        self.saver.hurry(self.seconds_left())
        if self._saved != self.images and self.place.world == 1:
            if self._broken.item():
                raise self._non_finite(int(self._broken_at.item()), "found when asked to go")
            self._save(True, {"sums": self._sums.tolist(), "seconds": self._clock.seconds(), "waited": self._clock.waited})
        elif self._saved != self.images:
            self._save(True)
        self.saver.wait()
        if self.place.world > 1:  # the first of them to be gone takes the others along, and one of them writes
            torch.distributed.barrier()
        raise TerminatedError(f"{self.task.stage}: asked to go; a checkpoint at image {self.images} is written, and the same command goes on from it")

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        state = self.optimizer.state
        return {f"{name}.{key}": value for name, p in self.task.model.named_parameters() if p in state for key, value in state[p].items()}

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        parameters = dict(self.task.model.named_parameters())
        for full, value in tensors.items():
            name, _, key = full.rpartition(".")
            self.optimizer.state[parameters[name]][key] = value.to(self.place.device)

    # -- running ------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the last metrics line.

        Raises:
            NonFiniteError: a loss or gradient is not finite; no weight was updated with it.
            CheckpointError: a checkpoint could not be written.
            TerminatedError: the process was asked to go.
        """
        try:
            line = self._run()
        except BaseException:
            try:
                self.saver.close()
            except CheckpointError as error:  # said, and no more: what ended the training is what counts
                print(f"{self.task.stage}: {error}", flush=True)
            raise
        self.saver.close()
        return line

    def _run(self) -> dict[str, Any]:
        config, size, clock = self.config, self.config.batch_size, self._clock
        clock.start = time.monotonic()
        for batch in clock.timed(feed(self._prepare, range(self.images, self.total, size), ahead=0 if self.place.device.type == "cpu" else 2)):
            self._step(batch)
            self.images += size
            sample, save = self._due(config.sample_images), self._due(config.checkpoint_images)
            if not (sample or save or self._due(config.log_images)):
                self.on_step(self.images, None)
                if self._alone_and_asked():
                    self._go()
                continue
            self._measure(clock)
            if sample and self.place.rank == 0:
                with self.ema.applied(), self._precision():
                    self._line.update(self.task.evaluate(self.images))
            self.lines.append(self._line)
            self.on_step(self.images, self._line)
            if save:
                self._save(must=self.images == self.total)
                self.on_checkpoint(self._line)
            clock.restart()
            if self.images < self.total and (self._going or self._alone_and_asked()):
                self._go()
        return self._line

    def _due(self, every: int | None) -> bool:
        """Whether the last step passed a multiple of ``every`` images, or was the last of all."""
        return self.images == self.total or (every is not None and self.images % every < self.config.batch_size)

    def _draw(self, start: int) -> Draw:
        """The draws of this worker's slice of the samples [start, start + batch)."""
        share = self.config.batch_size // self.place.world
        first = start + self.place.rank * share
        return self.draws(first, first + share)

    def _prepare(self, start: int) -> Batch:
        """Prepare this worker's slice of the samples [start, start + batch)."""
        batch = self.task.batch(self._draw(start))
        if self.place.device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return batch

    def _precision(self) -> torch.autocast:
        """Matrix products in bfloat16 if asked for; weights, norms and losses stay in float32."""
        return torch.autocast(self.place.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _step(self, batch: Batch) -> None:
        device, size = self.place.device, self.config.batch_size
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        losses, times = self._gradients(batch)  # (n,), (n,)
        gradients = [p.grad for p in self.trained if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._check(losses.mean(), norm)
        if self.config.clip_norm is not None and self._clips(norm, self.config.clip_norm):
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.config.clip_norm, norm)
        rate = learning_rate(self.config, self.images + size, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.images + size, size)
        bins = (times * TIME_BINS).long().clamp_(0, TIME_BINS - 1)
        self._sums[:TIME_BINS].index_add_(0, bins, losses)
        self._sums[TIME_BINS : 2 * TIME_BINS].index_add_(0, bins, torch.ones_like(losses))
        self._sums[2 * TIME_BINS] += norm

    def _clips(self, norm: Tensor, limit: float) -> bool:
        """Whether clipping changes a gradient: below the limit torch multiplies all by one, which on a CPU takes 1 % of a step."""
        return not self.check_each_step or (limit / (norm + 1e-6)).item() < 1  # torch's own factor; a GPU is not waited for

    def _gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Gradients of the mean loss of this worker's slice, summed over equal micro-batches; returns losses (n,) and times (n,)."""
        share = self.config.batch_size // self.place.world
        rows = share if self.config.micro_batch is None else int(self.config.micro_batch)  # a number, once it is settled
        found = []
        for start in range(0, share, rows):
            # Several workers average their gradients once, after the last micro-batch.
            waiting = start + rows < share and isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if waiting else nullcontext():
                with self._precision():
                    losses, times = self.task.losses(self.model, {name: tensor[start : start + rows] for name, tensor in batch.items()})
                (losses.sum() / share).backward()
            found.append((losses.detach(), times))
        losses, times = (torch.cat(parts) for parts in zip(*found, strict=True))
        return losses, times

    # -- measuring ----------------------------------------------------------------------------------------------

    def _check(self, loss: Tensor, norm: Tensor) -> None:
        """Stop at a non-finite loss or gradient, or see to it that the device does no update with it."""
        if self.check_each_step:
            if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
                raise self._non_finite(self.images + self.config.batch_size, f"loss {loss.item()}, gradient norm {norm.item()}")
            return
        broken = (~(torch.isfinite(loss) & torch.isfinite(norm))).to(self._broken.dtype)
        self._broken_at += (broken > self._broken) * float(self.images + self.config.batch_size)
        torch.maximum(self._broken, broken, out=self._broken)
        # Fused AdamW reads this on the device: at 1 it leaves weights and moments alone.
        self.optimizer.found_inf = self._broken  # type: ignore[attr-defined]

    def _non_finite(self, images: int, what: str) -> NonFiniteError:
        """The error of the step that ended at ``images``, with what helps."""
        rows = self._broken_rows(images - self.config.batch_size)
        if rows:
            shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
            helps = f"What it read is no number either, in the rows {shown}: copy their shard anew, or pass --rebuild partition"
        else:
            helps = (
                f"Lower train.learning_rate (now {self.config.learning_rate:g}), lengthen train.warmup_images (now {self.config.warmup_images}), "
                f"or set train.clip_norm (now {self.config.clip_norm}) and train.precision=fp32"
            )
        return (BrokenRowsError if rows else NonFiniteError)(
            f"{self.task.stage}: not a finite number at image {images} ({what}); stopped before the update, and the checkpoint before it is good. "
            f"{helps}; then start the stage anew."
        )

    def _broken_rows(self, start: int) -> list[str]:
        """Ids of rows of a step, on whatever worker, that are not finite themselves: a step's samples can be read again."""
        draw = self.draws(start, start + self.config.batch_size)
        good = [tensor.isfinite().flatten(1).all(1) for tensor in self.task.batch(draw).values() if tensor.ndim > 1]
        return sorted({self.task.ids[row] for row in draw.rows[~torch.stack(good).all(0).numpy()]})

    def _measure(self, clock: Clock) -> None:
        """Make the metrics line of the interval that ends here; the only place where the loop waits for a GPU."""
        self._sums[-1] = float(self.asked_to_go())
        if self.place.world > 1:
            torch.distributed.all_reduce(self._sums)
        sums = self._sums.double().tolist()
        self._sums.zero_()
        self._going = sums.pop() > 0
        if self._broken.item():
            raise self._non_finite(int(self._broken_at.item()), "found at the metrics line after it")
        loss, count = sums[:TIME_BINS], sums[TIME_BINS : 2 * TIME_BINS]
        images, seconds = round(sum(count)), clock.seconds()
        self.seconds += seconds
        self._line = {
            "images": self.images,
            "loss": sum(loss) / images,
            "loss_by_time": [s / n if n else None for s, n in zip(loss, count, strict=True)],
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "grad_norm": sums[-1] / self.place.world / (images / self.config.batch_size),
            "images_per_second": images / seconds if seconds > 0 else 0.0,
            "data_wait": clock.waited / seconds if seconds > 0 else 0.0,
            "seconds": self.seconds,
        }
        if self._peak and seconds > 0:
            self._line["mfu"] = self.mfu(images / seconds)

    def mfu(self, images_per_second: float) -> float | None:
        """Model FLOP utilisation of all workers, where the device's peak is known: recomputed activations and frozen encoders are no use."""
        return self.task.flops * images_per_second / (self._peak * self.place.world) if self._peak else None
