"""What the server measures, for Prometheus through Ray: every name is here, and ``static/grafana.json`` is a dashboard of them.

Imports Ray only where it is used, and no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
_SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Metric:
    """A name and what it means. Prometheus sees ``ray_`` before it, and after a histogram's ``_bucket``, ``_sum`` and ``_count``."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


ANSWERS = Metric("paris_answers_total", "counter", "Answers to requests for pictures; reason is 'ok' or the error's code.", ("status", "reason"))
BROKEN_STREAMS = Metric("paris_broken_streams_total", "counter", "Streams that had begun and ended with an error.", ("reason",))
QUEUED = Metric("paris_queued", "gauge", "Pictures that wait.")
ACTIVE = Metric("paris_active", "gauge", "Pictures that are being stepped.")
READY = Metric("paris_expert_ready", "gauge", "Whether an expert can be asked, 1 or 0.", ("expert",))
PICTURES = Metric("paris_pictures_total", "counter", "Pictures by their end: finished, failed, cancelled, or rejected by a full queue.", ("end",))
ADMITTED = Metric("paris_admitted_total", "counter", "Pictures that got a place in the queue.")
PICTURE_SECONDS = Metric("paris_picture_seconds", "histogram", "From submission to the picture.", (), _SECONDS)
STEP_SECONDS = Metric("paris_step_seconds", "histogram", "One evaluation of all active pictures, decoding included.", (), _SECONDS)
DECODE_SECONDS = Metric("paris_decode_seconds", "histogram", "Decoding pictures or previews that are due at the same time.", (), _SECONDS)
STEP_ROWS = Metric("paris_step_rows", "histogram", "Pictures stepped together.", (), _ROWS)
EXPERT_ROWS = Metric("paris_expert_rows", "histogram", "Rows of an expert's batch; steps without any do not count.", ("expert",), _ROWS)
ROUTED = Metric("paris_routed_pictures_total", "counter", "Finished pictures, divided among the experts by their weights.", ("expert",))
MASKED = Metric("paris_masked_probability", "histogram", "The most that the router gave a finished picture's missing experts.", (), _SHARES)

ALL = (
    ANSWERS, BROKEN_STREAMS, QUEUED, ACTIVE, READY, PICTURES, ADMITTED, PICTURE_SECONDS, STEP_SECONDS, DECODE_SECONDS, STEP_ROWS, EXPERT_ROWS, ROUTED,
    MASKED,
)  # fmt: skip

Report: TypeAlias = Callable[..., None]
"""Called with a metric, a value (what to add, to set, or one observation) and the tags by name."""


def ignore(metric: Metric, value: float, **tags: str) -> None:
    """Report nothing."""


def to_ray(metric: Metric, value: float, **tags: str) -> None:
    """Report through Ray, whose nodes show it to Prometheus."""
    here = _ray(metric)
    if metric.kind == "counter":
        if value > 0:
            here.inc(value, tags)
    elif metric.kind == "gauge":
        here.set(value, tags)
    else:
        here.observe(value, tags)


@cache
def _ray(metric: Metric) -> Any:
    from ray.util import metrics

    if metric.kind == "histogram":
        return metrics.Histogram(metric.name, metric.description, list(metric.boundaries), metric.tags)
    return (metrics.Counter if metric.kind == "counter" else metrics.Gauge)(metric.name, metric.description, metric.tags)
