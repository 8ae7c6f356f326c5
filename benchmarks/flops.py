"""Floating-point operations of a DiT, counted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from paris_ray.models import DiT


def count(model: DiT, text_tokens: int) -> dict[str, int]:
    """Operations for one image, a multiplication and an addition being two: of a forward pass, a sampling step, and forward and backward.

    Only matrix products and attention are counted. What gradient checkpointing computes again is not: it is a cost, not a use.

    Args:
        model: on any device; it is copied in shape only.
        text_tokens: length of the text.
    """
    keywords = {"image_size": model.image_size, "patch_size": model.patch_size, "in_channels": model.in_channels, "out_channels": model.out_channels}
    block = model.layers[0]
    width, inner = block.mlp[0].in_features, block.mlp[0].out_features
    with torch.device("meta"):
        shape = {"hidden_size": width, "num_layers": len(model.layers), "num_heads": block.attn.num_heads, "mlp_ratio": inner / width}
        empty = DiT(**keywords, **shape, text_embed_dim=model.text_embed_dim).to("meta")
        x, t = torch.empty(1, model.in_channels, model.image_size, model.image_size), torch.empty(1)
        text = torch.empty(1, text_tokens, model.text_embed_dim)
        keys_values = empty.text_keys_values(text)
    return {
        "forward": operations(lambda: empty(x, t, text)),
        "sampling step": operations(lambda: empty(x, t, keys_values=keys_values)),
        "training step": operations(lambda: empty(x, t, text).sum().backward()),
    }


def operations(function: Callable[[], object]) -> int:
    """Of a call, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())
