"""The router: p(cluster | x_t, t), and by default p(cluster | x_t, t, caption) (arXiv 2510.03434; DiT arXiv 2212.09748).

Without text, tensor names and shapes are those of the released Paris checkpoint; B/2 with 8 clusters has 129,136,904 parameters.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from paris_ray.models.layers import (
    GELU,
    Attention,
    Linear,
    PatchEmbed,
    PreciseLinear,
    TimeEmbedding,
    at_least_float32,
    initialize_trunk,
    mlp,
    modulate,
    sincos_positions,
)
from paris_ray.models.network import Network


class RouterBlock(nn.Module):
    """A DiT block with adaLN-Zero of its own."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, norm_eps: float = 1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=norm_eps, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=norm_eps, elementwise_affine=False)
        self.mlp = mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), PreciseLinear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(N, T, D), (N, D) → (N, T, D)."""
        dtype = self.attn.in_proj_bias.dtype  # of matrix products; the rest is float32 or better
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)  # 6 × (N, D)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa).to(dtype))  # (N, T, D)
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp).to(dtype))  # (N, T, D)


NEW_SHARE = 0.01
"""Probability that a cluster which a router does not know yet has at most."""


def with_more_clusters(weights: dict[str, Tensor], num_clusters: int) -> dict[str, Tensor]:
    """A router's weights with rows for further clusters, after those that it knows.

    The probabilities of the old ones keep their ratios. A new one's logit is the mean of the old K ones, plus what makes its probability at most
    :data:`NEW_SHARE`: that mean alone makes it at most 1 / (K + 1), as the mean of exponentials is no less than the exponential of the mean.
    """
    grown = dict(weights)
    shift = {"head.4.weight": 0.0, "head.4.bias": math.log(len(weights["head.4.bias"]) * NEW_SHARE / (1 - NEW_SHARE))}
    for name, more in shift.items():
        old = weights[name]  # (K, D), (K,)
        grown[name] = torch.cat([old, (old.mean(0, keepdim=True) + more).expand(num_clusters - len(old), *old.shape[1:])])
    return grown


class Router(Network):
    """Classifies a noisy latent by the cluster it came from.

    Args:
        num_clusters: number of experts K.
        image_size: side of the latent.
        patch_size: side of a patch.
        in_channels: channels of the latent.
        hidden_size: width D.
        num_layers: number of blocks.
        num_heads: attention heads.
        mlp_ratio: inner width of the MLP over D.
        text_embed_dim: width of the pooled text that is read beside the time; ``None`` is the paper's text-blind router.
        norm_eps: epsilon of the blocks' norms; that of the head's LayerNorm is torch's 1e-5.
        gradient_checkpointing: recompute the blocks in the backward pass, to save memory.

    Raises:
        ValueError: patches do not cover the latent, or heads do not share the width evenly.
    """

    SETTINGS: ClassVar[dict[str, Any]] = {"model_type": "router", "architecture": "dit", "use_dit_time_embed": True}

    def __init__(
        self,
        num_clusters: int = 8,
        image_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        text_embed_dim: int | None = None,
        norm_eps: float = 1e-6,
        gradient_checkpointing: bool = False,
    ):
        super().__init__(image_size, patch_size, in_channels, hidden_size, num_heads, gradient_checkpointing)
        self.num_clusters, self.text_embed_dim = num_clusters, text_embed_dim
        self.patch_embed = PatchEmbed(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.pos_embed = nn.Parameter(sincos_positions(hidden_size, image_size // patch_size), requires_grad=False)
        self.cls_token = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.time_embed = TimeEmbedding(hidden_size)
        if text_embed_dim is not None:
            self.text_proj = PreciseLinear(text_embed_dim, hidden_size)
        self.layers = nn.ModuleList(RouterBlock(hidden_size, num_heads, mlp_ratio, norm_eps) for _ in range(num_layers))
        self.head = nn.Sequential(
            Linear(hidden_size, hidden_size),
            GELU(),
            nn.LayerNorm(hidden_size),
            GELU(),
            Linear(hidden_size, num_clusters),
        )
        if not self.patch_embed.weight.is_meta:  # there, weights come from a file, and drawing would make torch import its compiler: seconds
            self.initialize_weights()

    def initialize_weights(self) -> None:
        """All initial values: DiT's; class token as in ViT."""
        initialize_trunk(self)
        nn.init.normal_(self.cls_token, std=0.02)
        # adaLN-Zero: every block starts as the identity.
        for layer in self.layers:
            nn.init.zeros_(layer.adaLN_modulation[1].weight)  # type: ignore[index,union-attr,arg-type]

    def forward(self, x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
        """Logits over clusters.

        Args:
            x: noisy latents on the linear path, (N, C, H, W).
            t: times in [0, 1], (N,); 1 is noise; in float32 or better.
            pooled: pooled text (N, text_embed_dim); required exactly when the router reads text.

        Returns:
            logits (N, K).

        Raises:
            ValueError: latents of another size, or pooled text where it is not read, or none where it is.
        """
        self._check_latents(x)
        if (pooled is None) != (self.text_embed_dim is None):
            raise ValueError("pooled text must be given to a router that reads text, and only to one")
        c = self.time_embed(t)  # (N, D)
        if pooled is not None:
            c = c + self.text_proj(pooled)  # (N, D)
        # Contiguous: sums keep the order in memory of what they add, and every block would pay for another.
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2).contiguous()  # (N, T, D)
        x = at_least_float32(tokens) + at_least_float32(self.pos_embed)  # (N, T, D)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (N, 1+T, D): the class token has no position
        for layer in self.layers:
            x = self._block(layer, x, c)  # (N, 1+T, D)
        return self.head(x[:, 0].to(self.head[0].bias.dtype))  # (N, K)
