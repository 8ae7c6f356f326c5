"""Parts that the expert and the router share."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x · (1 + scale) + shift`` with one shift and scale per sample: (N, T, D), (N, D), (N, D) → (N, T, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` itself, or in float32 if it is of lower precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


ROWS = 8
"""On a CPU the rows of a matrix product are filled up to a multiple of this."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``; on a CPU too a row has the same bits in any company.

    There the code that multiplies a few rows is another than that for many, and threads share rows out in fours and eights; with eights of rows all
    go one way. Tokens come in eights, so that this fills up what has one row a sample, and the router's tokens with their class token.
    """
    count = x.shape[:-1].numel()
    if x.device.type != "cpu" or count % ROWS == 0:
        return F.linear(x, weight, bias)
    filled = F.pad(x.reshape(count, -1), (0, 0, 0, -count % ROWS))
    return F.linear(filled, weight, bias)[:count].view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """``nn.Linear`` through :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class PatchEmbed(nn.Conv2d):
    """A convolution whose stride is its kernel. On a CPU torch computes a batch of one with other code, so there one is computed as two."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.shape[0] == 1:
            return super().forward(x.expand(2, -1, -1, -1))[:1]
        return super().forward(x)


class PreciseLinear(nn.Linear):
    """A linear layer computed in float32 or better, also where the network is set to bfloat16 or autocast is on.

    For what is small but reaches every token: the time embedding, the modulation, the last layer. One row a sample, or 16 outputs, cost nothing.
    Its weights stay in float32 when the network is set to less, so that no forward pass has to cast them.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PreciseLinear:
        def precisely(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            dtype = torch.promote_types(changed.dtype, torch.float32)
            return changed if changed.dtype == dtype else tensor.to(changed.device, dtype)  # not by way of fewer bits

        return super()._apply(precisely, recurse)

    def forward(self, x: Tensor) -> Tensor:
        weight = at_least_float32(self.weight)  # of a bfloat16 file that has not been moved or set to anything yet
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            return linear(x.to(weight.dtype), weight, at_least_float32(self.bias))


def time_frequencies(width: int = 256, max_period: float = 10_000.0) -> Tensor:
    """Angular frequencies of a time on the 0…1000 scale: (width/2,) float32, on the CPU."""
    half = width // 2
    # On the CPU also under torch.device("meta"), where this arithmetic would make torch import its compiler, seconds in every process.
    with torch.device("cpu"):
        return torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32) / half)


def timestep_embedding(t: Tensor, frequencies: Tensor) -> Tensor:
    """Sinusoids of a time on the 0…1000 scale, ``cat[cos, sin]``, in float32: (N,), (W/2,) → (N, W)."""
    angles = t.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_positions(width: int, side: int, step: float = 1.0) -> Tensor:
    """DiT's fixed two-dimensional sine-cosine table for a square grid of places ``step`` apart: (1, side², width), row-major."""
    with torch.device("cpu"):  # as above
        # DiT gives the first half of the channels to the horizontal coordinate, each half as [sin, cos].
        frequencies = 1.0 / 10_000.0 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
        places = torch.arange(side, dtype=torch.float64) * step
        rows, columns = torch.meshgrid(places, places, indexing="ij")
        halves = []
        for coordinate in (columns, rows):
            angles = coordinate.reshape(-1, 1) * frequencies
            halves += [angles.sin(), angles.cos()]
        table = torch.cat(halves, dim=1)
        return F.pad(table, (0, width - table.shape[1])).float().unsqueeze(0)


class TimeEmbedding(nn.Module):
    """Time in [0, 1] → vector: sinusoids of 1000·t, then a two-layer MLP."""

    frequencies: Tensor

    def __init__(self, hidden_size: int, frequency_width: int = 256):
        super().__init__()
        self.frequency_width = frequency_width
        self.register_buffer("frequencies", time_frequencies(frequency_width), persistent=False)
        self.mlp = nn.Sequential(PreciseLinear(frequency_width, hidden_size), nn.SiLU(), PreciseLinear(hidden_size, hidden_size))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TimeEmbedding:
        super()._apply(fn, recurse)
        # Constants: in float32 whatever the network is set to, and there also where it is given memory without values (to_empty).
        self.frequencies = time_frequencies(self.frequency_width).to(self.frequencies.device)
        return self

    def forward(self, t: Tensor) -> Tensor:
        """(N,) → (N, D), in float32 or better."""
        if t.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"t: times are {t.dtype}, whose steps near 1 are too coarse; give them in float32")
        return self.mlp(timestep_embedding(1000.0 * t.float(), self.frequencies))  # (N, 256) → (N, D)


class Attention(nn.Module):
    """Multi-head attention with the tensor names of ``nn.MultiheadAttention``, through SDPA.

    The fused ``in_proj`` is one matrix product for self-attention; for cross-attention its first third projects the queries and the rest the
    text's keys and values, which sampling computes once for all steps (:meth:`keys_values`).
    """

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_size))
        self.out_proj = Linear(hidden_size, hidden_size)

    def _projections(self, *rows: int) -> list[Callable[[Tensor], Tensor]]:
        """``in_proj`` as layers of so many rows each: (N, T, D) → (N, T, rows).

        By one split, so that the backward pass joins the gradients of the parts; each slice would fill a whole matrix with zeros, to be added up. All
        rows are the matrix itself, whose gradient needs no copy.
        """
        weight, bias = self.in_proj_weight, self.in_proj_bias
        parts = [(weight, bias)] if len(rows) == 1 else list(zip(weight.split(rows), bias.split(rows), strict=True))
        return [partial(linear, weight=w, bias=b) for w, b in parts]

    def _heads(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        return x.view(n, length, self.num_heads, width // self.num_heads).transpose(1, 2)  # (N, H, T, D/H)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(q, k, v)  # (N, H, T, D/H)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # (N, T, D)

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention: (N, T, D) → (N, T, D)."""
        (project,) = self._projections(3 * x.shape[-1])
        q, k, v = project(x).chunk(3, dim=-1)
        return self._attend(self._heads(q), self._heads(k), self._heads(v))

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a text: (N, S, D) → two of (N, H, S, D/H)."""
        d = text.shape[-1]
        return self._pairs(self._projections(d, 2 * d)[1](text))

    def _pairs(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        k, v = projected.chunk(2, dim=-1)
        return self._heads(k), self._heads(v)

    def cross(self, x: Tensor, context: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Cross-attention to a text (N, S, D), or to its keys and values: (N, T, D) → (N, T, D)."""
        d = x.shape[-1]
        queries, pairs = self._projections(d, 2 * d)
        keys_values = self._pairs(pairs(context)) if isinstance(context, Tensor) else context
        return self._attend(self._heads(queries(x)), *keys_values)


GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
GELU_CUBIC = GELU_LINEAR * 0.044715


class _SigmoidGELU(torch.autograd.Function):
    """The tanh form of GELU by the identity ``(1 + tanh u) / 2 = sigmoid(2u)``: ``x · sigmoid(2√(2/π) · (x + 0.044715 x³))``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (x * x).mul_(GELU_CUBIC).add_(GELU_LINEAR).mul_(x).sigmoid_().mul_(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        # In place, as memory is what it costs. With u = linear x + cubic x³, d/dx (x · sigmoid(u)) = sigmoid(u) + x u' · sigmoid'(u).
        cube = (x * x).mul_(x)
        u = (x * GELU_LINEAR).add_(cube, alpha=GELU_CUBIC)
        slope = cube.mul_(2 * GELU_CUBIC).add_(u)  # x u' = u + 2 cubic x³
        gate = u.sigmoid_()
        slope.mul_(torch.ops.aten.sigmoid_backward(gradient, gate))
        return slope.add_(gate.mul_(gradient))


class GELU(nn.Module):
    """GELU in its tanh form (DiT). On a CPU torch's tanh takes twice the time of its sigmoid, and compiled three times; there it goes by sigmoid."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == at_least_float32(x).dtype:
            return _SigmoidGELU.apply(x)  # type: ignore[no-any-return,no-untyped-call]
        return F.gelu(x, approximate="tanh")


def mlp(hidden_size: int, mlp_ratio: float) -> nn.Sequential:
    """Linear, GELU (tanh), Linear."""
    inner = int(hidden_size * mlp_ratio)
    return nn.Sequential(Linear(hidden_size, inner), GELU(), Linear(inner, hidden_size))


def initialize_trunk(model: nn.Module) -> None:
    """DiT's choices for what expert and router have in common: Xavier for matrices, 0.02 for the time MLP, zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Attention):
            nn.init.xavier_uniform_(module.in_proj_weight)
            nn.init.zeros_(module.in_proj_bias)
        elif isinstance(module, nn.Conv2d):
            # As the linear layer over a flattened patch that it is.
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, TimeEmbedding):
            nn.init.normal_(module.mlp[0].weight, std=0.02)
            nn.init.normal_(module.mlp[2].weight, std=0.02)
