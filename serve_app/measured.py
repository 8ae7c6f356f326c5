"""An engine that reports what it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from paris_ray.inference.engine import Engine, ImageResult
from serve_app import metrics
from serve_app.metrics import Report

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from paris_ray.diffusion.ensemble import Experts
    from paris_ray.inference.weights import ParisModel

_ENDS = ("finished", "failed", "cancelled", "rejected")


class MeasuredEngine(Engine):
    """Reports after every tick what has changed since the one before.

    Args:
        model: as for :class:`Engine`; its codec is timed from now on.
        experts: where velocities come from.
        report: where the numbers go.
        limits: ``max_rows`` and ``max_queue``.
    """

    def __init__(self, model: ParisModel, experts: Experts, report: Report, **limits: int):
        super().__init__(model, experts, **limits)
        self.report, self._seen = report, self.metrics
        model.codec = _Timed(model.codec, report)  # type: ignore[assignment]

    def tick(self, after: Callable[[Tensor], Tensor] | None = None) -> bool:
        """See :meth:`Engine.tick`."""
        with self.driving:
            began = time.perf_counter()
            more = super().tick(after)
            self._tell(time.perf_counter() - began)
            return more

    def _tell(self, seconds: float) -> None:
        now, before = self.metrics, self._seen
        self._seen = now
        for end in _ENDS:
            self.report(metrics.PICTURES, now[end] - before[end], end=end)
        self.report(metrics.QUEUED, now["queued"])
        self.report(metrics.ACTIVE, now["active"])
        if rows := now["evaluations"] - before["evaluations"]:
            self.report(metrics.STEP_SECONDS, seconds)
            self.report(metrics.STEP_ROWS, rows)
            for k, (after, earlier) in enumerate(zip(now["rows_per_expert"], before["rows_per_expert"], strict=True)):
                if after > earlier:
                    self.report(metrics.EXPERT_ROWS, after - earlier, expert=str(k))


def tell_of_picture(report: Report, result: ImageResult) -> None:
    """Report a finished picture: how long it took, and who made it."""
    report(metrics.PICTURE_SECONDS, result.seconds)
    report(metrics.MASKED, result.masked_probability)
    columns: Sequence[Any] = list(zip(*(step["weights"] for step in result.routing), strict=True))
    for k, weights in enumerate(columns):
        report(metrics.ROUTED, sum(weights) / len(weights), expert=str(k))


class _Timed:
    """A codec whose decoding is timed."""

    def __init__(self, codec: Any, report: Report):
        self._codec, self._report = codec, report

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codec, name)

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        began = time.perf_counter()
        images: NDArray[np.uint8] = self._codec.decode(latents)
        self._report(metrics.DECODE_SECONDS, time.perf_counter() - began)
        return images
