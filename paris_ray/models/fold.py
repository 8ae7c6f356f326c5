"""A DiT's modulations, one linear layer a block, folded into adaLN-single: one layer for all blocks, and a table for each.

Block i of a DiT computes its modulation m_i(t) = W_i f_i(t) + b_i with f_i(t) = SiLU(time_i(t) + class); ours is W f(t) + b + table_i, with f = f_0.
Over a grid of times, Σ_i Σ_t ‖m_i(t) − W f(t) − b − table_i‖² is least where b + table_i = mean_t(m_i(t) − W f(t)), and, with M_i and F the centred
m_i and f, where W is least for Σ_i ‖M_i − W F‖². That has its gradient Σ_i (M_i − W F) Fᵀ vanish exactly if W does the same for ‖mean_i M_i − W F‖².

- Where blocks have one time MLP and one class table, as in DiT, all M_i = W_i F, and W = mean_i W_i is a minimum.
- Where they have their own, as in a DiT trained in diffusers, W = mean_i W_i + (mean_i M_i − mean_i W_i F) F⁺, the minimum next to the mean, but for
  directions in which F hardly varies.

We set b = mean_i b_i. The class is DiT's "no class" (the last row of its table), added to the time MLP's last bias, which is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from paris_ray.models.layers import time_frequencies, timestep_embedding

FOLD_TIMES = 200
"""Times on DiT's 0…1000 scale, evenly spaced, over which adaLN is folded."""

FAINT = 1e-2
"""Directions of the features with a singular value below this share of the largest are left to the mean: they would lower the residual by less than
1 % and make the weights two to six times as large."""

Sources = tuple[str, ...]


@dataclass(frozen=True)
class Folded:
    """A tensor computed from several.

    Attributes:
        sources: their names in the file.
        residual: root mean square of what the fold loses over that of the modulation it stands for; 0 is exact.
    """

    sources: Sources
    residual: float


@dataclass(frozen=True)
class Adaln:
    """Names of what makes one block's modulation in a DiT: the linear layer, the two of the time MLP, the table of classes."""

    modulation: str
    time: tuple[str, str]
    classes: str

    def sources(self) -> list[Sources]:
        """Names of the linear layers' tensors, and of the table."""
        return [(f"{layer}.weight", f"{layer}.bias") for layer in (self.modulation, *self.time)] + [(self.classes,)]


def fold(tensors: Mapping[str, Tensor], blocks: list[Adaln]) -> tuple[dict[str, Tensor], dict[str, Folded]]:
    """The module's rule.

    Args:
        tensors: of the DiT, by name.
        blocks: where in them each block's modulation is.

    Returns:
        values of ``t_block.1``, of all tables and of the last time bias, in float64; and where each came from, with what is lost.
    """
    weights, biases = [f"{block.modulation}.weight" for block in blocks], [f"{block.modulation}.bias" for block in blocks]
    weight, bias = _mean(tensors, weights), _mean(tensors, biases)  # (6D, D), (6D,)
    ours = _features(tensors, blocks[0])  # (T, D)
    alike = [_alike(tensors, block, blocks[0]) for block in blocks]

    def modulation(i: int) -> Tensor:  # computed twice, because all at once would take 0.3 GB
        features = ours if alike[i] else _features(tensors, blocks[i])
        return F.linear(features, tensors[weights[i]].double(), tensors[biases[i]].double())  # (T, 6D)

    if not all(alike):
        missed = sum(modulation(i) for i in range(len(blocks))) / len(blocks) - F.linear(ours, weight, bias)  # (T, 6D)
        inverse = torch.linalg.pinv(ours - ours.mean(0), rtol=FAINT)  # (D, T)
        weight = weight + (inverse @ (missed - missed.mean(0))).T
    shared = F.linear(ours, weight, bias)  # (T, 6D)

    own_bias = f"{blocks[0].time[1]}.bias"
    no_class = tensors[own_bias].double() + tensors[blocks[0].classes][-1].double()
    values = {"t_block.1.weight": weight, "t_block.1.bias": bias, "time_embed.mlp.2.bias": no_class}
    folded = {"time_embed.mlp.2.bias": Folded((own_bias, blocks[0].classes), 0.0)}
    lost = total = 0.0
    for i, block in enumerate(blocks):
        theirs = modulation(i)
        table = (theirs - shared).mean(0)  # (6D,)
        error, size = (theirs - shared - table).square().sum().item(), theirs.square().sum().item()
        lost, total = lost + error, total + size
        # What a block has of its own beside its linear layer: in diffusers' layout all but the first block's time MLP and classes.
        others = () if block.time == blocks[0].time else tuple(name for names in block.sources()[1:] for name in names)
        values[f"layers.{i}.scale_shift_table"] = table.view(6, -1)
        folded[f"layers.{i}.scale_shift_table"] = Folded((weights[i], biases[i], *others), _ratio(error, size))
    folded["t_block.1.weight"], folded["t_block.1.bias"] = Folded(tuple(weights), _ratio(lost, total)), Folded(tuple(biases), 0.0)
    return values, folded


def _features(tensors: Mapping[str, Tensor], block: Adaln) -> Tensor:
    """What a block's modulation is linear in, SiLU(time MLP + no class), over the grid of times: (FOLD_TIMES, D) float64."""
    first, second = block.time
    frequencies = time_frequencies(tensors[f"{first}.weight"].shape[1])
    h: Tensor = timestep_embedding(torch.arange(FOLD_TIMES) * (1000.0 / FOLD_TIMES), frequencies).double()  # (T, 256)
    h = F.silu(F.linear(h, tensors[f"{first}.weight"].double(), tensors[f"{first}.bias"].double()))
    h = F.linear(h, tensors[f"{second}.weight"].double(), tensors[f"{second}.bias"].double())  # (T, D)
    return F.silu(h + tensors[block.classes][-1].double())


def _alike(tensors: Mapping[str, Tensor], one: Adaln, other: Adaln) -> bool:
    """Whether two blocks have the same features: what diffusers' layout repeats in each block is one thing in a DiT that was converted to it."""
    names, others = ([f"{layer}.{kind}" for layer in block.time for kind in ("weight", "bias")] for block in (one, other))
    return all(torch.equal(tensors[a], tensors[b]) for a, b in zip(names, others, strict=True)) and torch.equal(
        tensors[one.classes][-1], tensors[other.classes][-1]
    )


def _mean(tensors: Mapping[str, Tensor], names: list[str]) -> Tensor:
    """In float64, one after the other: all of a DiT-XL's at once would be 2 GB."""
    total = torch.zeros_like(tensors[names[0]], dtype=torch.float64)
    for name in names:
        total += tensors[name]
    return total / len(names)


def _ratio(error: float, size: float) -> float:
    return (error / size) ** 0.5 if size > 0 else 0.0
