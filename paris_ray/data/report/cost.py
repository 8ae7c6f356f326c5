"""What training each expert will cost, before anyone pays: from the clusters' sizes and the run's config. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paris_ray.config import RunConfig
from paris_ray.progress import clock
from paris_ray.stages import expert_name
from paris_ray.training.budget import MFU, PEAK_TFLOPS, Inputs, expert_flops, gpu_hours, router_flops, total_images

ENOUGH_PASSES = 100
"""Passes over its pictures below which a small expert drew nothing, and above which nearly all (docs/notebook.md)."""

FEW_ROWS = 10_000
"""Clusters up to which that is said; it was measured on some hundred pictures and tells nothing of millions."""

DEVICES = {name: PEAK_TFLOPS[name] for name in ("A40", "A100", "H100")}
"""Those that hours are named for."""

UNEQUAL = 2.0
"""Ratio of the largest to the smallest expert's training above which it is worth a warning."""


def estimate(config: RunConfig, sizes: Sequence[int], encoders: dict[str, Any]) -> dict[str, Any]:
    """Images, arithmetic and hours of each training stage, as the config stands.

    Arithmetic is three forward passes an image (one for the loss, two for the gradients), and a fourth with ``gradient_checkpointing``. Frozen
    encoders, which run only where token ids are stored, validation and samples are not in it.

    Args:
        config: the run's.
        sizes: train rows of each expert.
        encoders: the content of ``RUN/encoders/encoders.json``.

    Returns:
        ``stages``: of each expert and the router ``stage``, ``rows``, ``images``, ``passes`` (images for each row), ``flops_per_image``, ``flops``,
        ``workers``, ``gpus`` of each worker and ``gpu_hours`` of all of them by device; ``critical``: the expert that takes longest when all run at
        once; ``mfu`` and ``peak_tflops``, which the hours assume.
    """
    inputs = Inputs.of(encoders)
    lines = [_stage(expert_name(k), config.experts[k], size, expert_flops(config.experts[k].model, inputs)) for k, size in enumerate(sizes)]
    blind = Inputs(inputs.channels, inputs.side, inputs.text_tokens, 0)
    forward = router_flops(config.router.model, inputs if config.router.text == "pooled" else blind, config.num_experts)
    critical = max(lines, key=lambda line: line["flops"] / line["workers"])["stage"]
    return {"stages": [*lines, _stage("router", config.router, sum(sizes), forward)], "critical": critical, "mfu": MFU, "peak_tflops": DEVICES}


def _stage(name: str, spec: Any, rows: int, forward: int) -> dict[str, Any]:
    images, each = total_images(spec.train, rows), (4 if spec.train.gradient_checkpointing else 3) * forward
    flops = each * images
    return {
        "stage": name,
        "rows": rows,
        "images": images,
        "passes": images / rows,
        "flops_per_image": each,
        "flops": flops,
        "workers": spec.resources.num_workers,
        "gpus": spec.resources.gpus,
        "gpu_hours": {device: gpu_hours(flops, peak) for device, peak in DEVICES.items()},
    }


def time_text(hours: float) -> str:
    """A time on a GPU for people: ``< 1 s``, ``3 min 05 s``, ``412 h``."""
    if hours < 1 / 3600:
        return "< 1 s"
    return clock(3600 * hours) if hours < 100 else f"{hours:,.0f} h".replace(",", "\u202f")


def warnings(cost: dict[str, Any]) -> list[str]:
    """What of the budgets somebody should think over before training."""
    experts = [line for line in cost["stages"] if line["stage"] != "router"]
    found = []
    short = [line for line in experts if line["passes"] < ENOUGH_PASSES and line["rows"] <= FEW_ROWS]
    if short:
        listed = ", ".join(f"{line['stage']} ({line['passes']:.0f})" for line in short)
        found.append(
            f"Fewer than {ENOUGH_PASSES} passes over its pictures: {listed}. On clusters this small nothing was learnt below that, and nearly all "
            "above it: raise train.passes or train.min_images."
        )
    least, most = (pick(experts, key=lambda line: line["flops"]) for pick in (min, max))
    if most["flops"] > UNEQUAL * least["flops"]:
        found.append(
            f"{most['stage']} takes {most['flops'] / least['flops']:.1f} times the arithmetic of {least['stage']}, and the run is as long as its "
            "longest expert: lower partition.max_share, give that expert more workers, or set train.images for all alike."
        )
    return found
