"""Our adaLN-single block beside diffusers' PixArt-α block: the same function where both have the same parts."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from paris_ray.models.dit import DiTBlock

D, HEADS = 32, 4

MAP = {
    "scale_shift_table": ["scale_shift_table"],
    "attn.in_proj_weight": ["attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_v.weight"],
    "attn.in_proj_bias": ["attn1.to_q.bias", "attn1.to_k.bias", "attn1.to_v.bias"],
    "attn.out_proj.weight": ["attn1.to_out.0.weight"],
    "attn.out_proj.bias": ["attn1.to_out.0.bias"],
    "cross_attn.in_proj_weight": ["attn2.to_q.weight", "attn2.to_k.weight", "attn2.to_v.weight"],
    "cross_attn.in_proj_bias": ["attn2.to_q.bias", "attn2.to_k.bias", "attn2.to_v.bias"],
    "cross_attn.out_proj.weight": ["attn2.to_out.0.weight"],
    "cross_attn.out_proj.bias": ["attn2.to_out.0.bias"],
    "mlp.0.weight": ["ff.net.0.proj.weight"],
    "mlp.0.bias": ["ff.net.0.proj.bias"],
    "mlp.2.weight": ["ff.net.2.weight"],
    "mlp.2.bias": ["ff.net.2.bias"],
}
"""Our tensors ← theirs, one above the other. No tensor of either block is left out."""


def blocks() -> tuple[DiTBlock, BasicTransformerBlock]:
    torch.manual_seed(0)
    theirs = BasicTransformerBlock(
        D, HEADS, D // HEADS, cross_attention_dim=D, activation_fn="gelu-approximate", num_embeds_ada_norm=1000, attention_bias=True,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = DiTBlock(D, HEADS, norm_eps=1e-6)
    state = theirs.state_dict()
    assert sorted(name for sources in MAP.values() for name in sources) == sorted(state)
    ours.load_state_dict({name: torch.cat([state[source] for source in sources]) for name, sources in MAP.items()}, strict=True)
    return ours.double(), theirs.double().eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x, six, text = torch.randn(3, 10, D, generator=g), torch.randn(3, 6, D, generator=g), torch.randn(3, 7, D, generator=g)
    return x.double(), six.double(), text.double()


def test_block_is_diffusers_pixart_block() -> None:
    ours, theirs = blocks()
    x, six, text = inputs()
    with torch.no_grad():
        y = ours(x, six, ours.cross_attn.keys_values(text))
        expected = theirs(x, encoder_hidden_states=text, timestep=six.flatten(1))
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("row", range(6))
def test_each_row_of_the_modulation_means_the_same(row: int) -> None:
    """Shift, scale, gate of attention, then of the MLP: exchanging any two would show here."""
    ours, theirs = blocks()
    x, six, text = inputs()
    six = six.clone()
    six[:, row] += 1.0
    with torch.no_grad():
        before = ours(x, inputs()[1], ours.cross_attn.keys_values(text))
        y = ours(x, six, ours.cross_attn.keys_values(text))
        expected = theirs(x, encoder_hidden_states=text, timestep=six.flatten(1))
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(before, y, atol=1e-3)
