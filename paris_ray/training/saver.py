"""Checkpoints written beside the training: steps go on while one is serialised and uploaded, and while a store cannot be reached."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from paris_ray.storage import Folder
from paris_ray.training import checkpoint

PATIENCE_S = 3600.0
"""A checkpoint that cannot be written is tried again for so long; then it is an error, because what a failure would cost only grows."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


class CheckpointError(RuntimeError):
    """A checkpoint could not be written for :data:`PATIENCE_S`, or in the time that was left."""


class Saver:
    """Writes a stage's checkpoints in a thread of its own, one at a time, from a copy of the tensors in memory that is kept for it.

    A write that fails is tried again, with growing pauses. A checkpoint that is due meanwhile is left out (:meth:`ready`), so that a slow or lost
    store makes checkpoints rarer and not the steps slower.

    Args:
        stage: the stage's folder.
        keep: checkpoints to keep.
    """

    def __init__(self, stage: Folder, keep: int):
        self.stage, self.keep = stage, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written: Future[None] | None = None
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._hurry, self._until = threading.Event(), math.inf

    def ready(self) -> bool:
        """Whether the one before has been written. Raises what ended its writing."""
        if self._written is None:
            return True
        if not self._written.done():
            return False
        written, self._written = self._written, None
        written.result()
        return True

    def save(self, images: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], metrics: list[dict[str, Any]]) -> None:
        """Copy the tensors now, in the order of the device's work, and write them soon; waits for the one before. Arguments as of checkpoint.save."""
        self.wait()
        copies = {part: {name: self._copy(part, name, tensor) for name, tensor in named.items()} for part, named in tensors.items()}
        copied = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if copied is not None:
            copied.record()
        self._written = self._pool.submit(self._write, copied, images, copies, state, metrics)

    def wait(self) -> None:
        """Until what was given is written. Raises CheckpointError."""
        if self._written is not None:
            written, self._written = self._written, None
            written.result()

    def hurry(self, seconds: float = 0.0) -> None:
        """From now on try at once what is to be written, and again only for so many seconds: the process has to go."""
        self._until = time.monotonic() + seconds
        self._hurry.set()

    def close(self) -> None:
        """Give what is being written one more try, and let go of everything. Raises what ended it."""
        self.hurry()
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._copies.clear()

    def _copy(self, part: str, name: str, tensor: Tensor) -> Tensor:
        """In memory of the host; from a GPU without waiting for it. The memory is used again by the next checkpoint."""
        kept = self._copies.get((part, name))
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = self._copies[part, name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return kept.copy_(tensor.detach(), non_blocking=True)

    def _write(
        self,
        copied: torch.cuda.Event | None,
        images: int,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        metrics: list[dict[str, Any]],
    ) -> None:
        if copied is not None:
            copied.synchronize()
        began, pause = time.monotonic(), FIRST_PAUSE_S
        while True:
            hurry, until = self._hurry.is_set(), self._until
            try:
                checkpoint.save(self.stage, images, tensors, state, metrics)
                checkpoint.prune(self.stage, self.keep, images)
                return
            except OSError as error:
                why = f"checkpoint at image {images} cannot be written to {self.stage.uri}: {type(error).__name__}: {error}"
                if time.monotonic() > (until if hurry else began + PATIENCE_S):
                    raise CheckpointError(f"{why}. Make room, or mend the store; the same command goes on from the last good checkpoint") from error
                pause = FIRST_PAUSE_S if hurry else pause
                print(f"{why}; {'' if hurry else 'training goes on, and '}it is tried again in {pause:g} s", flush=True)
            if hurry:
                time.sleep(pause)
            else:
                self._hurry.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
