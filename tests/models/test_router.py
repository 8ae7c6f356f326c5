"""The router against the published parameter count, the released files' tensor table, and a straightforward second implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from paris_ray.models.router import Router

from .test_dit import attention, count, gelu_tanh, norm, patches, silu, time_vector


def test_b2_has_exactly_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        assert count(Router.named("B/2")) == 129_136_904


def test_tensors_are_those_of_the_released_files() -> None:
    d = 768
    expected: dict[str, tuple[int, ...]] = {
        "patch_embed.weight": (d, 4, 2, 2), "patch_embed.bias": (d,), "pos_embed": (1, 256, d), "cls_token": (1, 1, d),
        "time_embed.mlp.0.weight": (d, 256), "time_embed.mlp.0.bias": (d,), "time_embed.mlp.2.weight": (d, d), "time_embed.mlp.2.bias": (d,),
        "head.0.weight": (d, d), "head.0.bias": (d,), "head.2.weight": (d,), "head.2.bias": (d,), "head.4.weight": (8, d), "head.4.bias": (8,),
    }  # fmt: skip
    for i in range(12):
        here = f"layers.{i}."
        expected |= {
            here + "attn.in_proj_weight": (3 * d, d), here + "attn.in_proj_bias": (3 * d,),
            here + "attn.out_proj.weight": (d, d), here + "attn.out_proj.bias": (d,),
            here + "mlp.0.weight": (4 * d, d), here + "mlp.0.bias": (4 * d,), here + "mlp.2.weight": (d, 4 * d), here + "mlp.2.bias": (d,),
            here + "adaLN_modulation.1.weight": (6 * d, d), here + "adaLN_modulation.1.bias": (6 * d,),
        }  # fmt: skip
    with torch.device("meta"):
        blind, reading = Router.named("B/2"), Router.named("B/2", text_embed_dim=384)
    assert {name: tuple(tensor.shape) for name, tensor in blind.state_dict().items()} == expected
    assert {name for name in reading.state_dict() if name not in expected} == {"text_proj.weight", "text_proj.bias"}


def reference(model: Router, heads: int, eps: float, x: Tensor, t: Tensor, pooled: Tensor | None) -> Tensor:
    s = model.state_dict()
    c = time_vector(s, t)
    if pooled is not None:
        c = c + pooled @ s["text_proj.weight"].T + s["text_proj.bias"]
    h = patches(s, x, 2)
    h = torch.cat([s["cls_token"].expand(len(x), 1, -1), h], 1)
    for i in range(len(model.layers)):
        here = f"layers.{i}."
        m = (silu(c) @ s[here + "adaLN_modulation.1.weight"].T + s[here + "adaLN_modulation.1.bias"]).view(len(x), 6, 1, -1)
        a = norm(h, eps) * (1 + m[:, 1]) + m[:, 0]
        h = h + m[:, 2] * attention(s, here + "attn.", heads, a, a)
        a = norm(h, eps) * (1 + m[:, 4]) + m[:, 3]
        inner = gelu_tanh(a @ s[here + "mlp.0.weight"].T + s[here + "mlp.0.bias"])
        h = h + m[:, 5] * (inner @ s[here + "mlp.2.weight"].T + s[here + "mlp.2.bias"])
    y = gelu_tanh(h[:, 0] @ s["head.0.weight"].T + s["head.0.bias"])
    y = gelu_tanh(norm(y, 1e-5) * s["head.2.weight"] + s["head.2.bias"])
    return y @ s["head.4.weight"].T + s["head.4.bias"]


def random_router(text: int | None) -> Router:
    torch.manual_seed(0)
    model = Router(5, image_size=6, in_channels=3, hidden_size=32, num_layers=3, num_heads=4, text_embed_dim=text)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


@pytest.mark.parametrize("text", [None, 7])
def test_forward_is_the_second_implementations(text: int | None) -> None:
    model = random_router(text)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 6, 6, generator=g, dtype=torch.float64)
    t = torch.tensor([0.0, 0.12, 0.9, 1.0], dtype=torch.float64)
    pooled = None if text is None else torch.randn(4, text, generator=g, dtype=torch.float64)
    with torch.no_grad():
        y = model(x, t, pooled)
        expected = reference(model, 4, 1e-6, x, t, pooled)
    assert y.shape == (4, 5)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_text_is_given_exactly_when_it_is_read() -> None:
    x, t = torch.zeros(1, 3, 6, 6).double(), torch.zeros(1).double()
    with pytest.raises(ValueError, match="pooled text"):
        random_router(7)(x, t)
    with pytest.raises(ValueError, match="pooled text"):
        random_router(None)(x, t, torch.zeros(1, 7).double())


def test_new_blocks_are_the_identity() -> None:
    torch.manual_seed(0)
    model = Router(4, image_size=6, in_channels=3, hidden_size=32, num_layers=2, num_heads=4)
    h, c = torch.randn(2, 10, 32), torch.randn(2, 32)
    for layer in model.layers:
        assert torch.equal(layer(h, c), h)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    """To the bit, and the blocks are really run twice."""
    runs: list[int] = []
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = Router(4, image_size=6, in_channels=3, hidden_size=32, num_layers=2, num_heads=4, gradient_checkpointing=checkpointing)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        model.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
        g = torch.Generator().manual_seed(1)
        model(torch.randn(2, 3, 6, 6, generator=g), torch.tensor([0.3, 0.9])).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
        assert len(runs) == (3 if checkpointing else 1)
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
