"""The expert: a DiT with adaLN-single and cross-attention to text (arXiv 2510.03434; DiT arXiv 2212.09748; PixArt-α arXiv 2310.00426).

Tensor names and shapes are those of the released Paris checkpoint. DiT-XL/2 has 605,970,448 parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from paris_ray.models.layers import (
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

KeysValues = list[tuple[Tensor, Tensor]]
"""Keys and values of the text, per layer: two of (N, H, S, D/H)."""


class DiTBlock(nn.Module):
    """Self-attention, cross-attention and MLP; self-attention and MLP modulated and gated by adaLN-single.

    The cross-attention has neither norm nor gate of its own, as in PixArt-α.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, norm_eps: float = 1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=norm_eps, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads)
        self.cross_attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=norm_eps, elementwise_affine=False)
        self.mlp = mlp(hidden_size, mlp_ratio)
        self.scale_shift_table = nn.Parameter(torch.empty(6, hidden_size))

    def forward(self, x: Tensor, modulation: Tensor, context: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """(N, T, D), (N, 6, D), projected text (N, S, D) or its keys and values → (N, T, D)."""
        # With weights in bfloat16, x, norms and modulation are float32 all the same, as they are under autocast; only matrix products take less.
        dtype = self.attn.in_proj_bias.dtype
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (self.scale_shift_table + modulation).unbind(1)  # 6 × (N, D)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa).to(dtype))  # (N, T, D)
        x = x + self.cross_attn.cross(x.to(dtype), context)  # (N, T, D)
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp).to(dtype))  # (N, T, D)


class FinalLayer(nn.Module):
    """Norm modulated by a table plus the raw time embedding, then one linear layer to patches."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, norm_eps: float = 1e-6):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=norm_eps, elementwise_affine=False)
        self.linear = PreciseLinear(hidden_size, patch_size * patch_size * out_channels)
        self.scale_shift_table = nn.Parameter(torch.empty(2, hidden_size))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(N, T, D), (N, D) → (N, T, p²·C)."""
        shift, scale = (self.scale_shift_table + time.unsqueeze(1)).unbind(1)  # 2 × (N, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (N, T, p²·C)


class DiT(Network):
    """One expert: predicts velocity (flow matching) or noise (DDPM) of a latent.

    Args:
        image_size: side of the latent.
        patch_size: side of a patch.
        in_channels: channels of the latent.
        out_channels: channels predicted; the released experts predict no variance.
        hidden_size: width D.
        num_layers: number of blocks.
        num_heads: attention heads.
        mlp_ratio: inner width of the MLP over D.
        text_embed_dim: width of the text states.
        norm_eps: epsilon of the norms (1e-6 in DiT and PixArt-α).
        gradient_checkpointing: recompute the blocks in the backward pass, to save memory.

    Raises:
        ValueError: patches do not cover the latent, or heads do not share the width evenly.
    """

    SETTINGS: ClassVar[dict[str, Any]] = {
        "model_type": "dit_expert", "architecture": "dit", "use_text_conditioning": True, "use_class_conditioning": False, "use_dit_time_embed": True,
        "use_adaln_single": True, "expert_id": None, "num_classes": None, "cfg_dropout_prob": None, "objective": None, "noise_schedule": None,
    }  # fmt: skip

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 4,
        hidden_size: int = 1152,
        num_layers: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        text_embed_dim: int = 768,
        norm_eps: float = 1e-6,
        gradient_checkpointing: bool = False,
    ):
        super().__init__(image_size, patch_size, in_channels, hidden_size, num_heads, gradient_checkpointing)
        self.out_channels, self.text_embed_dim = out_channels, text_embed_dim

        self.patch_embed = PatchEmbed(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        # Fixed, as in DiT; a parameter because the released files hold it.
        self.pos_embed = nn.Parameter(sincos_positions(hidden_size, image_size // patch_size), requires_grad=False)
        self.time_embed = TimeEmbedding(hidden_size)
        self.text_proj = Linear(text_embed_dim, hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), PreciseLinear(hidden_size, 6 * hidden_size))
        self.layers = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio, norm_eps) for _ in range(num_layers))
        self.final_layer = FinalLayer(hidden_size, patch_size, out_channels, norm_eps)
        if not self.patch_embed.weight.is_meta:  # there, weights come from a file, and drawing would make torch import its compiler: seconds
            self.initialize_weights()

    def initialize_weights(self) -> None:
        """All initial values: DiT's, with PixArt-α's for what DiT lacks."""
        initialize_trunk(self)
        width = self.pos_embed.shape[-1]
        # adaLN-single: the shared projection small, the tables of scale 1/√D (PixArt-α).
        nn.init.normal_(self.t_block[1].weight, std=0.02)
        for layer in self.layers:
            nn.init.normal_(layer.scale_shift_table, std=width**-0.5)  # type: ignore[arg-type]
            # A new cross-attention adds nothing at first.
            nn.init.zeros_(layer.cross_attn.out_proj.weight)  # type: ignore[union-attr,arg-type]
        nn.init.normal_(self.final_layer.scale_shift_table, std=width**-0.5)
        # The output starts at zero (DiT).
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def text_keys_values(self, text: Tensor) -> KeysValues:
        """Keys and values of text states for every layer, reusable over all steps: (N, S, text_embed_dim) → per layer two of (N, H, S, D/H)."""
        projected = self.text_proj(text)  # (N, S, D)
        return [layer.cross_attn.keys_values(projected) for layer in self.layers]  # type: ignore[union-attr]

    def unpatchify(self, x: Tensor) -> Tensor:
        """(N, T, p²·C) → (N, C, H, W), in DiT's order."""
        n, p, c, grid = x.shape[0], self.patch_size, self.out_channels, self.image_size // self.patch_size
        x = x.view(n, grid, grid, p, p, c).permute(0, 5, 1, 3, 2, 4)  # nhwpqc → nchpwq
        return x.reshape(n, c, grid * p, grid * p)

    def forward(self, x: Tensor, t: Tensor, text: Tensor | None = None, keys_values: KeysValues | None = None) -> Tensor:
        """Predict from a noisy latent.

        Args:
            x: latents (N, C, H, W), of the weights' type unless under autocast.
            t: times in [0, 1], (N,); 1 is noise; in float32 or better.
            text: text states (N, S, text_embed_dim), of the weights' type unless under autocast.
            keys_values: instead of ``text``, what :meth:`text_keys_values` made of it.

        Returns:
            velocity or noise, (N, C, H, W), in float32 or better.

        Raises:
            ValueError: latents of another size, or neither text nor keys and values.
        """
        self._check_latents(x)
        contexts: Iterable[Tensor | tuple[Tensor, Tensor]]
        if keys_values is not None:
            contexts = keys_values
        elif text is not None:
            contexts = [self.text_proj(text)] * len(self.layers)
        else:
            raise ValueError("DiT.forward needs text or keys_values")
        # Contiguous: sums keep the order in memory of what they add, and every block would pay for another.
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2).contiguous()  # (N, T, D)
        x = at_least_float32(tokens) + at_least_float32(self.pos_embed)  # (N, T, D)
        time = self.time_embed(t)  # (N, D)
        modulation = self.t_block(time).view(x.shape[0], 6, -1)  # (N, 6, D)
        for layer, context in zip(self.layers, contexts, strict=True):
            x = self._block(layer, x, modulation, context)  # (N, T, D)
        return self.unpatchify(self.final_layer(x, time))  # (N, C, H, W)
