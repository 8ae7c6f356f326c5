"""The precision of an expert's weights: float32, bfloat16, or int8 with one scale per output channel.

DDPM experts stay in float32 whatever is asked: x̂_0 = (x − σ·ε̂)/α divides their error by α ≥ 0.01 near t = 1, which is where sampling starts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paris_ray.diffusion.path import Objective
from paris_ray.models import DiT
from paris_ray.models.layers import Attention, PreciseLinear

PRECISIONS = ("fp32", "bf16", "int8")


def check_precision(precision: str) -> None:
    """Raise ValueError for a precision that is not one of :data:`PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r} is not one of {', '.join(PRECISIONS)}")


def set_precision(module: DiT, objective: Objective, precision: str) -> DiT:
    """An expert with its weights in a precision; may change the module given.

    ``int8`` keeps the matrices of attention and MLP as integers, and multiplies them out in every forward pass. The rest (tables, embeddings, time,
    final layer: 2 % of XL/2, which takes 0.62 GB) and the products are in bfloat16 on a GPU and in float32 on a CPU, where bfloat16 is slower.

    Args:
        module: the expert, as its file has it.
        objective: what its output means; experts that predict noise are left in float32.
        precision: one of :data:`PRECISIONS`.
    """
    check_precision(precision)
    if precision == "fp32" or objective.name == "ddpm":
        return module.to(torch.float32)
    if precision == "bf16":
        return module.to(torch.bfloat16)
    dtype = torch.float32 if module.patch_embed.weight.device.type == "cpu" else torch.bfloat16
    for layer in module.layers:
        _quantize(layer)
    for parameter in module.parameters():
        # The scales are buffers, and stay in float32.
        parameter.data = parameter.data.to(dtype)
    return module


def _quantize(parent: nn.Module) -> None:
    for name, child in parent.named_children():
        _quantize(child)
        if isinstance(child, Attention):
            setattr(parent, name, Int8Attention(child))
        elif isinstance(child, nn.Linear) and not isinstance(child, PreciseLinear):
            setattr(parent, name, Int8Linear(child))


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as integers: (O, I) → int8 (O, I) in −127 … 127 and float32 scales (O, 1), weight ≈ integers · scales."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return torch.round(weight / scale).clamp(-127, 127).to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer whose matrix is kept as int8 with a scale per output channel."""

    integers: Tensor
    scale: Tensor

    def __init__(self, source: nn.Linear):
        super().__init__()
        integers, scale = quantize(source.weight)
        self.register_buffer("integers", integers)
        self.register_buffer("scale", scale)
        self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O)."""
        return F.linear(x, (self.integers * self.scale).to(x.dtype), self.bias)


class Int8Attention(Attention):
    """Attention whose fused projection is kept as int8 with a scale per output channel; its ``out_proj`` is an :class:`Int8Linear` by then."""

    integers: Tensor
    scale: Tensor

    def __init__(self, source: Attention):
        nn.Module.__init__(self)  # not Attention's: it would make the matrix that is to go
        self.num_heads = source.num_heads
        integers, scale = quantize(source.in_proj_weight)
        self.register_buffer("integers", integers)
        self.register_buffer("scale", scale)
        self.in_proj_bias = source.in_proj_bias
        self.out_proj = source.out_proj

    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]
        """The matrix, multiplied out: (3 · D, D) of the bias's type."""
        return (self.integers * self.scale).to(self.in_proj_bias.dtype)
