"""The expert against the published parameter count, the released files' tensor table, and a straightforward second implementation."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paris_ray.models import DiT, Router
from paris_ray.models.layers import sincos_positions, time_frequencies, timestep_embedding


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def meta(size: str, **keywords: object) -> DiT:
    with torch.device("meta"):
        return DiT.named(size, **keywords)


def test_xl2_has_exactly_the_published_number_of_parameters() -> None:
    assert count(meta("XL/2")) == 605_970_448


@pytest.mark.parametrize(("size", "d", "depth"), [("XL/2", 1152, 28), ("B/2", 768, 12)])
def test_tensors_are_those_of_the_released_files(size: str, d: int, depth: int) -> None:
    """The table of the released checkpoint's module list."""
    expected: dict[str, tuple[int, ...]] = {
        "patch_embed.weight": (d, 4, 2, 2), "patch_embed.bias": (d,), "pos_embed": (1, 256, d),
        "time_embed.mlp.0.weight": (d, 256), "time_embed.mlp.0.bias": (d,), "time_embed.mlp.2.weight": (d, d), "time_embed.mlp.2.bias": (d,),
        "text_proj.weight": (d, 768), "text_proj.bias": (d,), "t_block.1.weight": (6 * d, d), "t_block.1.bias": (6 * d,),
        "final_layer.scale_shift_table": (2, d), "final_layer.linear.weight": (16, d), "final_layer.linear.bias": (16,),
    }  # fmt: skip
    for i in range(depth):
        expected[f"layers.{i}.scale_shift_table"] = (6, d)
        for attention in ("attn", "cross_attn"):
            expected[f"layers.{i}.{attention}.in_proj_weight"] = (3 * d, d)
            expected[f"layers.{i}.{attention}.in_proj_bias"] = (3 * d,)
            expected[f"layers.{i}.{attention}.out_proj.weight"] = (d, d)
            expected[f"layers.{i}.{attention}.out_proj.bias"] = (d,)
        expected[f"layers.{i}.mlp.0.weight"], expected[f"layers.{i}.mlp.0.bias"] = (4 * d, d), (4 * d,)
        expected[f"layers.{i}.mlp.2.weight"], expected[f"layers.{i}.mlp.2.bias"] = (d, 4 * d), (d,)
    assert {name: tuple(tensor.shape) for name, tensor in meta(size).state_dict().items()} == expected


# -- a second implementation --------------------------------------------------------------------------------------------


def attention(state: dict[str, Tensor], prefix: str, heads: int, q: Tensor, kv: Tensor) -> Tensor:
    module = nn.MultiheadAttention(q.shape[-1], heads, batch_first=True, dtype=torch.float64)
    module.load_state_dict({name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)})
    return module(q, kv, kv, need_weights=True)[0]  # need_weights: the explicit softmax, not the fused kernel


def norm(x: Tensor, eps: float) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + eps)


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def time_vector(state: dict[str, Tensor], t: Tensor) -> Tensor:
    half = 128
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = (1000 * t.float())[:, None] * frequencies
    sinusoid = torch.cat([angles.cos(), angles.sin()], 1).double()
    hidden = silu(sinusoid @ state["time_embed.mlp.0.weight"].T + state["time_embed.mlp.0.bias"])
    return hidden @ state["time_embed.mlp.2.weight"].T + state["time_embed.mlp.2.bias"]


def patches(state: dict[str, Tensor], x: Tensor, p: int) -> Tensor:
    n, _, side, _ = x.shape
    rows = [
        torch.einsum("ncab,dcab->nd", x[:, :, i : i + p, j : j + p], state["patch_embed.weight"]) + state["patch_embed.bias"]
        for i in range(0, side, p)
        for j in range(0, side, p)
    ]
    return torch.stack(rows, 1).view(n, len(rows), -1) + state["pos_embed"]


def reference(model: DiT, heads: int, eps: float, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    s, p, (n, _, side, _) = model.state_dict(), model.patch_size, x.shape
    time = time_vector(s, t)
    six = (silu(time) @ s["t_block.1.weight"].T + s["t_block.1.bias"]).view(n, 6, -1)
    context = text @ s["text_proj.weight"].T + s["text_proj.bias"]
    h = patches(s, x, p)
    for i in range(len(model.layers)):
        here = f"layers.{i}."
        m = (six + s[here + "scale_shift_table"][None]).unsqueeze(2)  # (N, 6, 1, D): shift, scale, gate of attention, then of the MLP
        a = norm(h, eps) * (1 + m[:, 1]) + m[:, 0]
        h = h + m[:, 2] * attention(s, here + "attn.", heads, a, a)
        h = h + attention(s, here + "cross_attn.", heads, h, context)
        a = norm(h, eps) * (1 + m[:, 4]) + m[:, 3]
        inner = gelu_tanh(a @ s[here + "mlp.0.weight"].T + s[here + "mlp.0.bias"])
        h = h + m[:, 5] * (inner @ s[here + "mlp.2.weight"].T + s[here + "mlp.2.bias"])
    two = s["final_layer.scale_shift_table"][None] + time[:, None]
    h = norm(h, eps) * (1 + two[:, 1:]) + two[:, :1]
    h = h @ s["final_layer.linear.weight"].T + s["final_layer.linear.bias"]
    c, out = model.out_channels, torch.empty(n, model.out_channels, side, side, dtype=x.dtype)
    for row in range(side // p):
        for column in range(side // p):
            patch = h[:, row * (side // p) + column].view(n, p, p, c)  # row within the patch, column, channel
            out[:, :, row * p : row * p + p, column * p : column * p + p] = patch.permute(0, 3, 1, 2)
    return out


def random_model(seed: int = 0, **keywords: object) -> DiT:
    torch.manual_seed(seed)
    model = DiT(
        **{"image_size": 8, "in_channels": 3, "out_channels": 5, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "text_embed_dim": 12, **keywords}
    )  # type: ignore[arg-type]
    for parameter in model.parameters():  # nothing left at zero
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


@pytest.mark.parametrize(("patch", "eps", "ratio"), [(2, 1e-6, 4.0), (4, 1e-5, 2.5), (1, 1e-6, 4.0)])
def test_forward_is_the_second_implementations(patch: int, eps: float, ratio: float) -> None:
    model = random_model(patch_size=patch, norm_eps=eps, mlp_ratio=ratio)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 8, 8, generator=g, dtype=torch.float64)
    text = torch.randn(3, 5, 12, generator=g, dtype=torch.float64)
    t = torch.tensor([0.0, 0.371, 1.0], dtype=torch.float64)
    with torch.no_grad():
        y, expected = model(x, t, text), reference(model, 4, eps, x, t, text)
    assert y.shape == (3, 5, 8, 8)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_cached_keys_and_values_change_nothing() -> None:
    model = random_model()
    x, t, text = torch.randn(2, 3, 8, 8).double(), torch.tensor([0.2, 0.9]).double(), torch.randn(2, 5, 12).double()
    with torch.no_grad():
        assert torch.equal(model(x, t, text), model(x, t, keys_values=model.text_keys_values(text)))
    with pytest.raises(ValueError, match="text or keys_values"):
        model(x, t)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    grads = []
    for checkpointing in (False, True):
        model = random_model(gradient_checkpointing=checkpointing).train()
        g = torch.Generator().manual_seed(2)
        x, text = torch.randn(2, 3, 8, 8, generator=g, dtype=torch.float64), torch.randn(2, 4, 12, generator=g, dtype=torch.float64)
        model(x, torch.tensor([0.1, 0.8], dtype=torch.float64), text).square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_sinusoid_is_cosine_then_sine_of_a_thousand_t() -> None:
    t = np.array([0.0, 0.25, 1.0])
    k = np.arange(128)
    angles = 1000 * t[:, None] * 10000.0 ** (-k / 128)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    found = timestep_embedding(torch.tensor(1000 * t), time_frequencies())
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)  # float32 at angles up to 1000
    assert found.dtype == torch.float32
    model = random_model()
    seen: list[Tensor] = []
    model.time_embed.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.zeros(3, 3, 8, 8).double(), torch.tensor(t), torch.zeros(3, 1, 12).double())
    np.testing.assert_allclose(seen[0].numpy(), expected, atol=2e-4)


def test_unpatchify_puts_every_number_where_dit_does() -> None:
    model = random_model(image_size=4, patch_size=2)
    tokens = torch.arange(4 * 4 * 5, dtype=torch.float64).view(1, 4, 20)
    image = model.unpatchify(tokens)
    for row in range(4):
        for column in range(4):
            for channel in range(5):
                token, inside = (row // 2) * 2 + column // 2, ((row % 2) * 2 + column % 2) * 5 + channel
                assert image[0, channel, row, column] == tokens[0, token, inside]


def test_positions_are_dits_table() -> None:
    """One by one: channel blocks sin x, cos x, sin y, cos y, where x is the column (DiT's and MAE's grid)."""
    width, side = 16, 3
    table = sincos_positions(width, side)[0]
    for row in range(side):
        for column in range(side):
            expected = []
            for coordinate in (column, row):
                angles = [coordinate / 10000 ** (i / 4) for i in range(4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            np.testing.assert_allclose(table[row * side + column].numpy(), expected, atol=1e-6)


def test_a_new_expert_predicts_zero_and_ignores_text() -> None:
    torch.manual_seed(0)
    model = DiT(image_size=8, in_channels=3, out_channels=3, hidden_size=32, num_layers=2, num_heads=4, text_embed_dim=12)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.7])
    assert model(x, t, torch.randn(2, 4, 12)).abs().max() == 0
    nn.init.normal_(model.final_layer.linear.weight)
    first, second = (model(x, t, torch.randn(2, 4, 12)) for _ in range(2))
    assert torch.equal(first, second)
    assert not model.pos_embed.requires_grad


@pytest.mark.parametrize("kind", [DiT, Router])
def test_impossible_shapes_are_refused(kind: type[DiT] | type[Router]) -> None:
    with pytest.raises(ValueError, match="image_size 9 must be a multiple of patch_size 2"):
        kind(image_size=9, patch_size=2, hidden_size=8, num_layers=1, num_heads=1)
    with pytest.raises(ValueError, match="hidden_size 30 must be a multiple of num_heads 4"):
        kind(image_size=8, hidden_size=30, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="'XS' is not one of XL/2"):
        DiT.named("XS")


@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (2, 3, 10, 10), (2, 4, 8, 8), (3, 8, 8)])
def test_latents_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    small = {"image_size": 8, "in_channels": 3, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    expert, router = DiT(**small, text_embed_dim=4), Router(**small)  # type: ignore[arg-type]
    x, t = torch.zeros(shape), torch.zeros(2)
    for call in (lambda: expert(x, t, torch.zeros(2, 1, 4)), lambda: router(x, t)):
        with pytest.raises(ValueError, match=rf"x: latents are of shape {re.escape(str(shape))}; this network takes \(N, 3, 8, 8\), no other size"):
            call()


# -- released configs ---------------------------------------------------------------------------------------------------

EXPERT = {
    "model_type": "dit_expert", "expert_id": 1, "architecture": "dit", "hidden_size": 1152, "num_layers": 28, "num_heads": 16, "patch_size": 2,
    "in_channels": 4, "out_channels": 4, "mlp_ratio": 4.0, "use_text_conditioning": True, "use_class_conditioning": False, "num_classes": 1000,
    "text_embed_dim": 768, "use_dit_time_embed": True, "use_adaln_single": True, "cfg_dropout_prob": 0.1,
}  # fmt: skip
ROUTER = {
    "model_type": "router", "architecture": "dit", "num_clusters": 8, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "patch_size": 2,
    "in_channels": 4, "use_dit_time_embed": True,
}  # fmt: skip
"""As published with the released checkpoint."""


def test_the_released_configs_are_the_networks_of_the_published_size() -> None:
    with torch.device("meta"):
        assert count(DiT.from_config(EXPERT)) == 605_970_448
        assert count(Router.from_config(ROUTER)) == 129_136_904
        assert DiT.from_config({**EXPERT, "image_size": 64, "norm_eps": 1e-5, "_diffusers_version": "0.35"}).image_size == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_norm": True}, "unknown setting qk_norm = True, which may change what the network computes"),
        ({"architecture": "unet"}, "architecture = 'unet' is not supported; this code computes only 'dit'"),
        ({"use_dit_time_embed": False}, "use_dit_time_embed = False is not supported; this code computes only True"),
        ({"gradient_checkpointing": True}, "unknown setting gradient_checkpointing"),  # of a run, not of a network
    ],
)
def test_settings_that_would_compute_something_else_are_refused(change: dict[str, object], message: str) -> None:
    for kind, config in ((DiT, EXPERT), (Router, ROUTER)):
        with pytest.raises(ValueError, match=message):
            kind.from_config({**config, **change})
        assert "qk_norm" not in kind.keywords({**config, "qk_norm": None})  # off
        with pytest.raises(ValueError, match="num_heads is missing, and no tensor's shape tells it"):
            kind.from_config({key: value for key, value in config.items() if key != "num_heads"})
    with pytest.raises(ValueError, match="use_adaln_single = False is not supported"):
        DiT.from_config({**EXPERT, "use_adaln_single": False})


# -- time ---------------------------------------------------------------------------------------------------------------


def test_the_frequencies_are_a_constant_that_no_file_holds_and_no_precision_changes() -> None:
    expected = torch.tensor([10000.0 ** (-k / 128) for k in range(128)])
    model = random_model()
    for changed in (model.double(), model.float(), model.bfloat16()):
        assert changed.time_embed.frequencies.dtype == torch.float32
        torch.testing.assert_close(changed.time_embed.frequencies, expected, rtol=1e-6, atol=0)
    assert not any("frequencies" in name for name in model.state_dict())
    # Also where a network is made without memory, and is given some that nobody has written to.
    with torch.device("meta"):
        empty = DiT(image_size=8, hidden_size=16, num_layers=1, num_heads=2)
    torch.testing.assert_close(empty.to_empty(device="cpu").time_embed.frequencies, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [DiT, Router])
def test_tokens_are_contiguous_in_every_block(kind: type[DiT] | type[Router]) -> None:
    model, seen = kind(image_size=8, hidden_size=32, num_layers=2, num_heads=2, text_embed_dim=12), []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    model(torch.randn(3, 4, 8, 8), torch.rand(3), torch.randn(3, 5, 12) if kind is DiT else torch.randn(3, 12))
    assert seen == [True, True]


def test_a_forward_pass_makes_no_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = random_model().float(), []
    monkeypatch.setattr(torch, "exp", made.append)
    model(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, 1, 12))
    assert not made


def test_networks_on_the_meta_device_do_not_import_torchs_compiler() -> None:
    code = """
import sys, torch
from paris_ray.models import DiT, Router
with torch.device("meta"):
    DiT.named("B/2"), Router.named("B/2")
print(sorted({"sympy", "torch._dynamo"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
