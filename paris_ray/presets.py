"""Presets: whole runs as Python functions that return a tree for :mod:`paris_ray.config` to validate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def demo() -> dict[str, Any]:
    """The whole system on the embedded corpus: eight small experts, minutes on two CPU cores."""
    train = {
        "passes": 116.0, "min_images": 15_500, "batch_size": 16, "learning_rate": 5e-3, "schedule": "cosine", "warmup_images": 1600,
        "beta2": 0.99, "ema_half_life_images": 2200, "timesteps": "logit_normal", "timestep_mean": 1.0, "checkpoint_images": 4800, "log_images": 800,
    }  # fmt: skip
    return {
        "name": "demo",
        "run_dir": "runs/demo",
        "data": {
            "source": {"kind": "openmoji", "emoji": 480, "grounds": ["white", "blue", "orange"]},
            "image_size": 32,
            "embedding": {"kind": "efficientnet_lite0", "image_size": 128},
            "codec": {"kind": "patch_pca", "downsampling": 4, "channels": 16},
            "text": {"kind": "minilm", "max_length": 16},
            "store_text": "states",
            "rows_per_part": 180,
            "max_encoders": 2,
        },
        "partition": {"fine": 64, "max_share": 1.1},
        "expert": {"model": {"hidden_size": 128, "num_layers": 4, "num_heads": 4}, "train": train},
        "experts": 8,
        "router": {
            "model": {"hidden_size": 128, "num_layers": 2, "num_heads": 4},
            "train": {**train, "images": 12_800, "learning_rate": 2e-3, "timesteps": "uniform"},
        },
        "sampling": {"steps": 25, "guidance_scale": 2.0},
        "serve": {"contact_sheets": True},
        "max_parallel": 3,
    }


def tiny() -> dict[str, Any]:
    """The smallest run that is still all of it: three unlike experts, one of them DDPM; for tests."""
    train = {
        "images": 320, "batch_size": 8, "learning_rate": 1e-3, "schedule": "cosine", "warmup_images": 32,
        "ema_half_life_images": 160, "checkpoint_images": 80, "log_images": 40,
    }  # fmt: skip
    base = demo()
    return {
        **base,
        "name": "tiny",
        "run_dir": "runs/tiny",
        "data": {
            **base["data"],
            "source": {"kind": "openmoji", "emoji": 48, "grounds": ["white", "blue"]},
            "codec": {"kind": "patch_pca", "downsampling": 4, "channels": 12},
            "rows_per_part": 32,
        },
        "partition": {"fine": 9, "max_share": 1.5, "contact_sheet": 12},
        "expert": {"model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2}, "train": train},
        "experts": [{}, {"objective": "ddpm"}, {"model": {"hidden_size": 48, "num_layers": 1, "num_heads": 4}}],
        "router": {"model": {"hidden_size": 32, "num_layers": 1, "num_heads": 2}, "train": train},
        "sampling": {"steps": 4, "guidance_scale": 2.0},
        "evaluation": {"captions_per_cluster": 2, "held_out_captions": 4},
    }


TOO_SMALL = {"B/2": "!16", "XL/2": "!in(16, 24, 32, 40)"}
"""Selectors of the label ``gpu_memory`` (GB), by size. They leave out what is labelled as too small; nodes without the label, as on a machine of
one's own, are taken as they are. GPUs of 16 GB have the memory for B/2, and no bfloat16."""


def _paris(name: str, size: str) -> dict[str, Any]:
    gpu = {"cpus": 8.0, "gpus": 1.0, "max_failures": -1}
    train = {
        "images": 50_000_000, "batch_size": 256, "learning_rate": 1e-4, "warmup_images": 256_000, "precision": "bf16", "compile": True,
        "micro_batch": 64, "checkpoint_images": 500_000, "log_images": 10_000, "sample_images": 1_000_000,
    }  # fmt: skip
    parts = {
        one: {"model": {"size": of}, "train": train, "resources": {**gpu, "labels": {"gpu_memory": TOO_SMALL[of]}}}
        for one, of in (("expert", size), ("router", "B/2"))
    }
    parts["router"]["train"] = {**train, "images": None, "passes": 25.0}
    return {
        "name": name,
        "run_dir": f"runs/{name}",
        "data": {
            # Where your images are: `--set data.source.uri=…`.
            "source": {"kind": "folder", "uri": "images"},
            "image_size": 256,
            "encoder_gpus": 1.0,
            "encoder_cpus": 4.0,
            "max_encoders": 64,
        },
        "partition": {"fine": 1024},
        **parts,
        "experts": 8,
        "sampling": {"steps": 50, "guidance_scale": 7.5},
        "serve": {"gpus": 1.0},
    }


def paris_b2() -> dict[str, Any]:
    """Paris at DiT-B/2 (arXiv 2510.03434); optimiser, batch and budget are not published and ours.

    For a GPU of 24 GB: compiled blocks, and 64 images at once, whose activations take 9 GB (counted: 0.13 GB an image) beside 3 GB of weights,
    gradients, moments and averages; the router as much.
    """
    return _paris("paris_b2", "B/2")


def paris_xl2() -> dict[str, Any]:
    """Paris at DiT-XL/2 (arXiv 2510.03434); optimiser, batch and budget are not published and ours.

    For experts a GPU of 48 GB or more: compiled blocks, and 64 images at once, whose activations take 30 GB (counted: 0.46 GB an image) beside 12 GB
    of weights, gradients, moments and averages. On 24 GB set ``expert.train.gradient_checkpointing=true``, with which an image takes 0.05 GB, and
    ``expert.resources.labels.gpu_memory="!16"``. The router is of size B/2, see :func:`paris_b2`.
    """
    return _paris("paris_xl2", "XL/2")


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {f.__name__: f for f in (demo, tiny, paris_b2, paris_xl2)}
