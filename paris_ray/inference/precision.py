"""The precision of an expert's weights: float32, bfloat16, or int8 with one scale per output channel.

DDPM experts stay in float32 whatever is asked: x̂_0 = (x − σ·ε̂)/α divides their error by α ≥ 0.01 near t = 1, which is where sampling starts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from paris_ray.diffusion.path import Objective
from paris_ray.models import DiT, Router
from paris_ray.models.layers import Attention, PreciseLinear, linear

PRECISIONS = ("fp32", "bf16", "int8")


def check_precision(precision: str) -> None:
    """Raise ValueError for a precision that is not one of :data:`PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r} is not one of {', '.join(PRECISIONS)}")


def check_device(device: str | torch.device) -> torch.device:
    """A device as torch knows it. Raises ValueError for one that is not here."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: {device!r} is none that torch knows; give cpu, cuda or cuda:N") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: {str(device)!r} is not here: torch {torch.__version__} sees {torch.cuda.device_count()} GPU(s); give cpu, or see what "
            "nvidia-smi and torch.version.cuda say of the driver"
        )
    return found


def set_precision(module: DiT, objective: Objective, precision: str, device: torch.device | None = None) -> DiT:
    """An expert with its weights in a precision; may change the module given.

    ``int8`` keeps the matrices of attention and MLP as integers, and multiplies out what a product needs of them when it needs it. The rest (tables,
    embeddings, text projection) and the products are in bfloat16 on a GPU and in float32 on a CPU, where bfloat16 is slower. What is computed in
    float32 whatever is asked (time, modulation, final layer: 2 % of XL/2, which takes 0.64 GB) stays in float32.

    Args:
        module: the expert, as its file has it.
        objective: what its output means; experts that predict noise are left in float32.
        precision: one of :data:`PRECISIONS`.
        device: where it will run; ``None`` is where it is.
    """
    check_precision(precision)
    if precision == "fp32" or objective.name == "ddpm":
        return module.to(torch.float32)
    on_cpu = (device or module.patch_embed.weight.device).type == "cpu"
    if precision == "int8":
        for layer in module.layers:
            _quantize(layer)
    _set_dtype(module, torch.float32 if precision == "int8" and on_cpu else torch.bfloat16)
    return module


def working_router(router: Router, precision: str, device: torch.device) -> Router:
    """The router that sampling asks: on a GPU beside experts that are not in float32 a copy in bfloat16, otherwise the one given.

    Args:
        router: the router, in float32.
        precision: of the experts.
        device: where they run.
    """
    check_precision(precision)
    if precision == "fp32" or device.type == "cpu":
        return router
    router = copy.deepcopy(router)
    _set_dtype(router, torch.bfloat16)
    return router


def _set_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Weights in a type, those of :class:`PreciseLinear` in float32; scales are buffers, and stay as they are."""
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            parameter.data = parameter.data.to(torch.float32 if isinstance(part, PreciseLinear) else dtype)


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


def multiplied(x: Tensor, integers: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer whose matrix is integers · scale: made in the type of ``x``, without a float32 one before it."""
    return linear(x, integers * scale.to(x.dtype), bias)


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
        return multiplied(x, self.integers, self.scale, self.bias)


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

    def _projections(self, *rows: int) -> list[Callable[[Tensor], Tensor]]:
        parts = zip(self.integers.split(rows), self.scale.split(rows), self.in_proj_bias.split(rows), strict=True)
        return [partial(multiplied, integers=integers, scale=scale, bias=bias) for integers, scale, bias in parts]
