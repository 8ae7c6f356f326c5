"""What a training will cost, from the config alone: images, arithmetic per image, hours on a GPU. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from paris_ray.config import ModelConfig, TrainConfig

PEAK_TFLOPS = {"A40": 149.7, "A100": 312.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.4, "H200": 989.4}
"""Peak of a device's matrix products in bfloat16 with fp32 sums, dense, in 10¹² operations a second (data sheets; where nothing is said, SXM)."""

MFU = 0.4
"""Share of the peak that training is assumed to reach; an assumption, not a measurement."""

RAMP = 0.1
"""The half-life of averaged weights is at most this share of the images so far, so that early averages do not remember the initial weights (ours; the
form is EDM2's, arXiv 2312.02696, which has 0.05)."""


def peak_flops(device_name: str) -> float | None:
    """Peak of a GPU, in operations a second, by the name that its driver gives it; ``None`` if its words hold no name of :data:`PEAK_TFLOPS`."""
    words = set(device_name.replace("-", " ").split())
    return next((1e12 * peak for name, peak in PEAK_TFLOPS.items() if words.issuperset(name.split())), None)


def total_images(config: TrainConfig, rows: int) -> int:
    """The budget in images, in whole batches: ``images``, else ``passes`` × rows but at least ``min_images``."""
    wanted = config.images if config.images is not None else max(math.ceil(config.passes * rows), config.min_images)
    return math.ceil(wanted / config.batch_size) * config.batch_size


@dataclass(frozen=True)
class Inputs:
    """Sizes of what a network reads.

    Attributes:
        channels: of a latent.
        side: of a latent.
        text_tokens: states of a caption.
        text_width: of a state; for a router that reads no text, 0.
    """

    channels: int
    side: int
    text_tokens: int
    text_width: int

    @classmethod
    def of(cls, encoders: dict[str, Any]) -> Inputs:
        """Those of an expert, from the content of ``RUN/encoders/encoders.json``."""
        codec, text = encoders["codec"], encoders["text"]
        return cls(codec["channels"], codec["latent_size"], text["max_length"], text["width"])


def expert_flops(model: ModelConfig, inputs: Inputs) -> int:
    """Operations of an expert's forward pass for one image: two for each multiply-add of a matrix product, convolution or attention.

    Norms, activations and softmax are left out, as is usual.
    """
    tokens = (inputs.side // model.patch_size) ** 2
    d = model.hidden_size
    block = _self_attention(tokens, d) + _mlp(tokens, model)
    block += 2 * tokens * d * d + 2 * tokens * inputs.text_tokens * d  # cross-attention: queries and output, attention itself
    once = _time(d) + 6 * d * d  # time_embed, t_block
    return 2 * (2 * _patches(tokens, model, inputs) + once + model.num_layers * block) + text_flops(model, inputs)


def text_flops(model: ModelConfig, inputs: Inputs) -> int:
    """What of :func:`expert_flops` depends on the caption alone, and is done once a picture where its result is kept: ``text_proj``, keys, values."""
    d, s = model.hidden_size, inputs.text_tokens
    return 2 * (s * inputs.text_width * d + model.num_layers * s * d * 2 * d)


def router_flops(model: ModelConfig, inputs: Inputs, num_experts: int) -> int:
    """Operations of the router's forward pass for one image, counted as in :func:`expert_flops`."""
    tokens = (inputs.side // model.patch_size) ** 2
    d = model.hidden_size
    block = _self_attention(tokens + 1, d) + _mlp(tokens + 1, model) + 6 * d * d  # the class token; adaLN-Zero in every block
    once = _patches(tokens, model, inputs) + _time(d) + inputs.text_width * d + d * d + d * num_experts
    return 2 * (once + model.num_layers * block)


def gpu_hours(flops: float, peak_tflops: float) -> float:
    """Hours that one device needs at :data:`MFU` of its peak."""
    return flops / (peak_tflops * 1e12 * MFU) / 3600


def _self_attention(tokens: int, d: int) -> int:
    return 4 * tokens * d * d + 2 * tokens * tokens * d


def _mlp(tokens: int, model: ModelConfig) -> int:
    return 2 * tokens * model.hidden_size * int(model.hidden_size * model.mlp_ratio)


def _time(d: int) -> int:
    return 256 * d + d * d


def _patches(tokens: int, model: ModelConfig, inputs: Inputs) -> int:
    """The patch embedding; an expert's last layer is as large."""
    return tokens * inputs.channels * model.patch_size**2 * model.hidden_size
