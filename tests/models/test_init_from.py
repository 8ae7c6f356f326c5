"""Weights of other networks in an expert: the same function as the reference network's, every tensor accounted for."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paris_ray.models import DiT
from paris_ray.models.fold import FOLD_TIMES
from paris_ray.models.init_from import InitReport, init_from, init_from_tensors

D, DEPTH, HEADS, SIDE, CLASSES = 32, 3, 4, 8, 10


def ours(**keywords: object) -> DiT:
    torch.manual_seed(5)
    shape = {"image_size": SIDE, "hidden_size": D, "num_layers": DEPTH, "num_heads": HEADS, "text_embed_dim": 12}
    return DiT(**{**shape, **keywords})  # type: ignore[arg-type]


def accounted(report: InitReport, model: DiT, tensors: dict[str, Tensor]) -> None:
    """Each tensor of ours is in exactly one part of the report, each of theirs is used or dropped."""
    parts = [set(report.kept), set(report.folded), set(report.new)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert set.union(*parts) == set(model.state_dict())
    used = {name for sources in report.kept.values() for name in sources} | {name for one in report.folded.values() for name in one.sources}
    assert used | set(report.dropped) == set(tensors)
    assert json.loads(json.dumps(report.as_json()))["layout"] == report.layout


def trunk_of(model: nn.Module, last: nn.Module, *arguments: Tensor, **keywords: Tensor) -> Tensor:
    """What goes into the final layer: (N, T, D)."""
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(*arguments, **keywords)
    handle.remove()
    return seen[0]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps 0…1000, text."""
    g = torch.Generator().manual_seed(3)
    n = torch.tensor([0.0, 13.0, 500.0, 981.5])
    return torch.randn(4, 4, SIDE, SIDE, generator=g).double(), n.double(), torch.randn(4, 5, 12, generator=g).double()


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# -- facebookresearch/DiT, by its documented names ----------------------------------------------------------------------


def dit_file(spread: float, seed: int = 0) -> dict[str, Tensor]:
    """A DiT's tensors at random; ``spread`` is how much the weights of the blocks' modulations differ from each other."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int, std: float = 0.2) -> Tensor:
        return std * torch.randn(*shape, generator=g)

    shapes = {
        "x_embedder.proj.weight": (D, 4, 2, 2), "x_embedder.proj.bias": (D,), "pos_embed": (1, 16, D),
        "t_embedder.mlp.0.weight": (D, 256), "t_embedder.mlp.0.bias": (D,), "t_embedder.mlp.2.weight": (D, D), "t_embedder.mlp.2.bias": (D,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, D),
        "final_layer.linear.weight": (2 * 2 * 8, D), "final_layer.linear.bias": (2 * 2 * 8,),
        "final_layer.adaLN_modulation.1.weight": (2 * D, D), "final_layer.adaLN_modulation.1.bias": (2 * D,),
    }  # fmt: skip
    common = random(6 * D, D)
    tensors = {name: random(*shape) for name, shape in shapes.items()}
    for i in range(DEPTH):
        here = f"blocks.{i}."
        block = {
            "attn.qkv.weight": (3 * D, D), "attn.qkv.bias": (3 * D,), "attn.proj.weight": (D, D), "attn.proj.bias": (D,),
            "mlp.fc1.weight": (4 * D, D), "mlp.fc1.bias": (4 * D,), "mlp.fc2.weight": (D, 4 * D), "mlp.fc2.bias": (D,),
            "adaLN_modulation.1.bias": (6 * D,),
        }  # fmt: skip
        tensors |= {here + name: random(*shape) for name, shape in block.items()}
        tensors[here + "adaLN_modulation.1.weight"] = common + spread * random(6 * D, D)
    return tensors


def dit_features(s: dict[str, Tensor], n: Tensor) -> Tensor:
    """SiLU(time + no class), written from DiT's code: (N,) → (N, D)."""
    frequencies = torch.tensor([10000 ** (-k / 128) for k in range(128)], dtype=torch.float64)
    angles = n.double()[:, None] * frequencies
    h = torch.cat([angles.cos(), angles.sin()], 1)
    h = nn.functional.silu(h @ s["t_embedder.mlp.0.weight"].T + s["t_embedder.mlp.0.bias"])
    h = h @ s["t_embedder.mlp.2.weight"].T + s["t_embedder.mlp.2.bias"]
    return nn.functional.silu(h + s["y_embedder.embedding_table.weight"][CLASSES])


def dit_trunk(tensors: dict[str, Tensor], x: Tensor, n: Tensor) -> Tensor:
    """DiT up to its final layer, without a class: (N, 4, H, W), (N,) → (N, T, D)."""
    s = {name: tensor.double() for name, tensor in tensors.items()}
    h = nn.functional.conv2d(x, s["x_embedder.proj.weight"], s["x_embedder.proj.bias"], stride=2).flatten(2).transpose(1, 2) + s["pos_embed"]
    features = dit_features(s, n)
    for i in range(DEPTH):
        w = {name.removeprefix(f"blocks.{i}."): tensor for name, tensor in s.items()}
        m = (features @ w["adaLN_modulation.1.weight"].T + w["adaLN_modulation.1.bias"]).unsqueeze(1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = m.chunk(6, dim=-1)
        a = nn.functional.layer_norm(h, (D,), eps=1e-6) * (1 + scale_a) + shift_a
        qkv = (a @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]).view(len(x), -1, 3, HEADS, D // HEADS)
        q, k, v = (qkv[:, :, j].transpose(1, 2) for j in range(3))
        mixed = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(D // HEADS), -1) @ v
        h = h + gate_a * (mixed.transpose(1, 2).reshape(h.shape) @ w["attn.proj.weight"].T + w["attn.proj.bias"])
        a = nn.functional.layer_norm(h, (D,), eps=1e-6) * (1 + scale_m) + shift_m
        inner = nn.functional.gelu(a @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"], approximate="tanh")
        h = h + gate_m * (inner @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"])
    return h


def from_dit(path: Path, spread: float) -> tuple[DiT, InitReport, dict[str, Tensor]]:
    tensors = dit_file(spread)
    save_file(tensors, path / "DiT.safetensors")
    model = ours()
    report = init_from(model, path / "DiT.safetensors")
    accounted(report, model, tensors)
    return model, report, tensors


def test_dit_whose_blocks_are_modulated_alike_is_kept_exactly(tmp_path: Path) -> None:
    """Biases differ, weights do not: tables hold the difference, and the trunk is DiT's."""
    model, report, tensors = from_dit(tmp_path, 0.0)
    x, n, text = inputs()
    found = trunk_of(model.double(), model.final_layer, x, n / 1000, text)
    assert report.layout == "dit"
    assert report.residual < 1e-6
    assert relative(found, dit_trunk(tensors, x, n)) < 1e-4  # sinusoids are float32 here, at angles up to 1000, as in DiT's own code
    assert torch.equal(found, trunk_of(model, model.final_layer, x, n / 1000, text + 1))  # new cross-attention adds nothing
    assert model(x, n / 1000, text).abs().max() == 0  # a new final layer


@pytest.mark.parametrize("spread", [0.01, 0.1])
def test_the_trunk_is_dits_within_the_residual_of_the_fold(tmp_path: Path, spread: float) -> None:
    model, report, tensors = from_dit(tmp_path, spread)
    x, n, text = inputs()
    error = relative(trunk_of(model.double(), model.final_layer, x, n / 1000, text), dit_trunk(tensors, x, n))
    assert spread / 50 < report.residual < spread
    assert 1e-5 < error < 3 * report.residual


def test_the_fold_is_the_least_squares_one(tmp_path: Path) -> None:
    """Against a general solver on the same grid: one weight for all blocks, one constant for each."""
    _, report, tensors = from_dit(tmp_path, 1.0)
    s = {name: tensor.double() for name, tensor in tensors.items()}
    features = dit_features(s, torch.arange(FOLD_TIMES) * 1000 / FOLD_TIMES)  # (T, D)
    targets = [features @ s[f"blocks.{i}.adaLN_modulation.1.weight"].T + s[f"blocks.{i}.adaLN_modulation.1.bias"] for i in range(DEPTH)]
    constants = torch.eye(DEPTH, dtype=torch.float64).repeat_interleave(FOLD_TIMES, 0)
    design = torch.cat([features.repeat(DEPTH, 1), constants], 1)  # (L·T, D + L)
    target = torch.cat(targets)
    solution = torch.linalg.lstsq(design, target, driver="gelsd").solution
    errors = (target - design @ solution).view(DEPTH, FOLD_TIMES, -1)
    best = [(errors[i].norm() / targets[i].norm()).item() for i in range(DEPTH)]
    assert min(best) > 0.1
    assert [report.folded[f"layers.{i}.scale_shift_table"].residual for i in range(DEPTH)] == pytest.approx(best, rel=1e-4)
    assert report.folded["t_block.1.weight"].residual == pytest.approx((errors.norm() / target.norm()).item(), rel=1e-4)


def test_what_a_file_does_not_say_and_what_a_fold_loses_is_said(tmp_path: Path) -> None:
    _, near, _ = from_dit(tmp_path, 0.0)
    assert not any("loses much" in note for note in near.notes)
    _, far, _ = from_dit(tmp_path, 0.5)
    assert any(f"loses much: up to {far.residual:.0%}" in note for note in far.notes)
    assert any(f"taken to be {HEADS}, as here" in note for note in far.notes)


def test_classes_without_one_for_no_class_are_refused(tmp_path: Path) -> None:
    tensors = dit_file(0.1)
    init_from_tensors(ours(), tensors, {"num_classes": CLASSES})
    with pytest.raises(ValueError, match=rf"has {CLASSES + 1} rows in y_embedder.* for {CLASSES + 1} classes"):
        init_from_tensors(ours(), tensors, {"num_classes": CLASSES + 1})


def test_what_is_kept_new_and_dropped_of_a_dit(tmp_path: Path) -> None:
    model, report, tensors = from_dit(tmp_path, 0.5)
    assert report.kept["layers.1.mlp.2.bias"] == ("blocks.1.mlp.fc2.bias",)
    assert torch.equal(model.pos_embed, tensors["pos_embed"])
    assert torch.equal(model.layers[2].attn.in_proj_weight, tensors["blocks.2.attn.qkv.weight"])
    assert {name.split(".")[0] for name in report.new} == {"text_proj", "layers", "final_layer"}
    assert {name for name in report.new if name.startswith("layers")} == {
        f"layers.{i}.cross_attn.{one}" for i in range(DEPTH) for one in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    }
    assert {name for name in report.dropped if not name.startswith("final_layer.")} == {"y_embedder.embedding_table.weight"}
    untouched = ours().state_dict()
    assert all(torch.equal(model.state_dict()[name], untouched[name]) for name in report.new)
    assert f"{len(report.kept)} tensors kept" in str(report)
    # What the start is, in words: the class-free DiT up to the final layer, which is new and puts out zero.
    note, *_ = report.notes
    assert note.startswith("the trunk is the class-free DiT's")
    assert "output starts at zero, from a new final layer" in note
    assert note in str(report)
    assert report.as_json()["notes"] == report.notes


def test_another_latent_and_grid_are_new(tmp_path: Path) -> None:
    save_file(dit_file(0.1), tmp_path / "a.safetensors")
    model = ours(in_channels=12, out_channels=12, image_size=16)
    report = init_from(model, tmp_path / "a.safetensors")
    accounted(report, model, dit_file(0.1))
    assert {"patch_embed.weight", "patch_embed.bias", "pos_embed"} <= report.new.keys()
    assert report.new["pos_embed"] == "pos_embed is (1, 16, 32) there, (1, 64, 32) here"
    assert report.dropped["x_embedder.proj.bias"] == "patch_embed.weight is (32, 4, 2, 2) there, (32, 12, 2, 2) here"
    assert torch.equal(model.pos_embed, ours(image_size=16).pos_embed)


# -- diffusers' DiT -----------------------------------------------------------------------------------------------------


def diffusers_dit(alike: bool) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=D // HEADS, in_channels=4, out_channels=8, num_layers=DEPTH, sample_size=SIDE, patch_size=2,
        num_embeds_ada_norm=CLASSES, norm_eps=1e-6,
    ).eval()  # fmt: skip
    first = model.transformer_blocks[0].norm1
    for block in model.transformer_blocks:
        # The frequencies that DiT's weights were trained with (see the module's docstring).
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        if alike:
            block.norm1.emb.load_state_dict(first.emb.state_dict())
            block.norm1.linear.weight.data.copy_(first.linear.weight)
    return model


@pytest.mark.parametrize("alike", [True, False])
def test_diffusers_dit(tmp_path: Path, alike: bool) -> None:
    """To rounding where its blocks are modulated alike; within the residual where all, the time MLPs included, are their own."""
    theirs = diffusers_dit(alike)
    theirs.save_pretrained(tmp_path)
    model = ours()
    report = init_from(model, tmp_path)
    accounted(report, model, load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    x, n, text = inputs()
    theirs = theirs.double()
    none = torch.full((len(x),), CLASSES)
    expected = trunk_of(theirs, theirs.norm_out, x, timestep=n, class_labels=none)
    error = relative(trunk_of(model.double(), model.final_layer, x, n / 1000, text), expected)
    assert report.layout == "dit_diffusers"
    if alike:
        assert report.residual < 1e-6
        assert error < 1e-6
    else:
        assert 0.01 < report.residual < 1
        assert 1e-4 < error < report.residual


def test_the_fold_of_unlike_time_mlps_is_the_least_squares_one_too(tmp_path: Path) -> None:
    """Against NumPy's solver: each block's modulation from its own features, ours from the first block's; the mean of the weights is far from it."""
    theirs = diffusers_dit(alike=False)
    theirs.save_pretrained(tmp_path)
    report = init_from(ours(), tmp_path)
    times = torch.arange(FOLD_TIMES) * 1000 / FOLD_TIMES
    none = torch.full((FOLD_TIMES,), CLASSES)
    targets, features = [], []
    with torch.no_grad():
        for block in theirs.double().transformer_blocks:
            features.append(nn.functional.silu(block.norm1.emb(times, none, hidden_dtype=torch.float64)).numpy())  # (T, D)
            linear = block.norm1.linear
            targets.append(features[-1] @ linear.weight.numpy().T + linear.bias.numpy())
        mean = sum(block.norm1.linear.weight.numpy() for block in theirs.transformer_blocks) / DEPTH

    def residual(errors: np.ndarray) -> float:
        return float(np.linalg.norm(errors) / np.linalg.norm(np.concatenate(targets)))

    target = np.concatenate(targets)
    design = np.concatenate([np.tile(features[0], (DEPTH, 1)), np.kron(np.eye(DEPTH), np.ones((FOLD_TIMES, 1)))], 1)  # (L·T, D + L)
    best = residual(target - design @ np.linalg.lstsq(design, target, rcond=None)[0])
    of_mean = np.concatenate([(error := one - features[0] @ mean.T) - error.mean(0) for one in targets])
    assert residual(of_mean) > 1.1 * best
    assert best * (1 - 1e-4) < report.folded["t_block.1.weight"].residual < 1.01 * best


def test_both_layouts_of_one_dit_give_the_same_expert(tmp_path: Path) -> None:
    tensors = dit_file(0.3)
    renamed = {"pos_embed.proj.weight": tensors["x_embedder.proj.weight"], "pos_embed.proj.bias": tensors["x_embedder.proj.bias"]}
    for kind in ("weight", "bias"):
        renamed |= {
            f"proj_out_1.{kind}": tensors[f"final_layer.adaLN_modulation.1.{kind}"],
            f"proj_out_2.{kind}": tensors[f"final_layer.linear.{kind}"],
        }
        for i in range(DEPTH):
            old, new = f"blocks.{i}", f"transformer_blocks.{i}"
            for letter, rows in zip("qkv", tensors[f"{old}.attn.qkv.{kind}"].chunk(3), strict=True):
                renamed[f"{new}.attn1.to_{letter}.{kind}"] = rows
            for one, other in {
                "attn1.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2", "norm1.linear": "adaLN_modulation.1",
            }.items():  # fmt: skip
                renamed[f"{new}.{one}.{kind}"] = tensors[f"{old}.{other}.{kind}"]
            for one, other in {"linear_1": "mlp.0", "linear_2": "mlp.2"}.items():
                renamed[f"{new}.norm1.emb.timestep_embedder.{one}.{kind}"] = tensors[f"t_embedder.{other}.{kind}"]
            renamed[f"{new}.norm1.emb.class_embedder.embedding_table.weight"] = tensors["y_embedder.embedding_table.weight"]
    assert renamed.keys() == diffusers_dit(True).state_dict().keys()
    tensors["pos_embed"] = ours().pos_embed.data.clone()  # theirs is not in the file: it is this table
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({name: tensor.clone() for name, tensor in renamed.items()}, tmp_path / "b.safetensors")
    one, other = ours(), ours()
    init_from(one, tmp_path / "a.safetensors")
    init_from(other, tmp_path / "b.safetensors")
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


# -- PixArt-α -----------------------------------------------------------------------------------------------------------


def pixart(**keywords: object) -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        **{
            "num_attention_heads": HEADS, "attention_head_dim": D // HEADS, "in_channels": 4, "out_channels": 8, "num_layers": DEPTH,
            "cross_attention_dim": D, "sample_size": SIDE, "caption_channels": 12, **keywords,
        }
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def test_pixart_is_kept_exactly_from_its_projected_text_to_its_prediction(tmp_path: Path) -> None:
    theirs = pixart()
    theirs.save_pretrained(tmp_path)
    model = ours(text_embed_dim=D)
    report = init_from(model, tmp_path)
    accounted(report, model, load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    assert report.layout == "pixart"
    assert not report.folded
    assert set(report.new) == {"pos_embed", "text_proj.weight", "text_proj.bias"}
    assert set(report.dropped) == {
        "proj_out.weight", "proj_out.bias", *(f"caption_projection.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
    }  # fmt: skip
    # The one part that differs is the projection of the text: with theirs before ours, and ours the identity, the two are one function.
    model, theirs = model.double(), theirs.double()
    with torch.no_grad():
        model.text_proj.weight.copy_(torch.eye(D))
        model.text_proj.bias.zero_()
        x, n, text = inputs()
        found = model(x, n / 1000, theirs.caption_projection(text))
        expected = theirs(x, encoder_hidden_states=text, timestep=n).sample
    # Their sinusoid is float32 as ours is, of 1000·(n/1000): that product's rounding is the difference.
    torch.testing.assert_close(found, expected[:, :4], rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert not torch.allclose(found, expected[:, 4:], atol=0.1)


def test_pixarts_final_layer_is_kept_and_said_to_predict_noise(tmp_path: Path) -> None:
    pixart().save_pretrained(tmp_path)
    report = init_from(ours(), tmp_path)
    assert {"final_layer.linear.weight", "final_layer.linear.bias", "final_layer.scale_shift_table"} <= report.kept.keys()
    assert report.notes == ("the final layer is kept: it predicts noise, which a ddpm expert learns; a flow expert learns velocity, noise less data",)
    model = ours(in_channels=12, out_channels=12)
    assert init_from(model, tmp_path).notes == ("the output starts at zero, from a new final layer",)
    x, n, text = (value.float() for value in inputs())
    assert model(x.repeat(1, 3, 1, 1), n / 1000, text).abs().max() == 0


@pytest.mark.parametrize(("size", "scale"), [(16, None), (SIDE, 2), (128, None), (128, 1)])
def test_pixarts_positions_at_another_size_are_its_own_for_our_grid(tmp_path: Path, size: int, scale: int | None) -> None:
    """Its files hold no positions; its model makes them anew for the grid it is given, from what its config says."""
    theirs = pixart(sample_size=size, interpolation_scale=scale, use_additional_conditions=False)
    theirs.save_pretrained(tmp_path)
    model = ours()
    report = init_from(model, tmp_path)
    accounted(report, model, load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    seen: list[Tensor] = []
    theirs.pos_embed.register_forward_hook(lambda module, args, out: seen.append(out - module.proj(args[0]).flatten(2).transpose(1, 2)))
    x, n, text = (value.float() for value in inputs())
    with torch.no_grad():
        theirs(x, encoder_hidden_states=text, timestep=n)
    torch.testing.assert_close(model.pos_embed.expand_as(seen[0]), seen[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.pos_embed, ours().pos_embed, atol=0.1)
    assert f"sample_size {size}" in report.new["pos_embed"]
    assert (f"interpolation_scale {scale}" in report.new["pos_embed"]) == (scale is not None)


def test_pixart_with_size_conditions_says_that_they_are_lost(tmp_path: Path) -> None:
    theirs = pixart(use_additional_conditions=True, num_attention_heads=2, attention_head_dim=48, cross_attention_dim=96)
    theirs.save_pretrained(tmp_path)
    model = ours(hidden_size=96, num_heads=2)
    report = init_from(model, tmp_path)
    accounted(report, model, load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    lost = {name for name, why in report.dropped.items() if "does not have" in why}
    assert len(lost) == 8
    assert all("resolution_embedder" in name or "aspect_ratio_embedder" in name for name in lost)


def test_pixart_whose_text_is_of_another_width_than_its_trunk_is_refused(tmp_path: Path) -> None:
    pixart(num_attention_heads=2, attention_head_dim=48, caption_channels=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"unequal width: .*attn2\.to_k\.weight.* for layers\.0\.cross_attn\.in_proj_weight"):
        init_from(ours(hidden_size=96, num_heads=2), tmp_path)


# -- our own ------------------------------------------------------------------------------------------------------------


def test_an_expert_of_our_own_is_kept_whole(tmp_path: Path) -> None:
    source = ours()
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    save_file(source.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": HEADS, "patch_size": 2, "norm_eps": 1e-5, "objective": "ddpm"}))
    model = ours()
    report = init_from(model, tmp_path)
    accounted(report, model, source.state_dict())
    assert report.notes == ("the final layer is kept: it predicts noise (objective ddpm there)", "norm_eps is 1e-05 there, 1e-06 here")
    assert len(report.kept) == len(model.state_dict())
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())
    other = ours(text_embed_dim=20)
    report = init_from(other, tmp_path)
    accounted(report, other, source.state_dict())
    assert set(report.new) == {"text_proj.weight", "text_proj.bias"} == set(report.dropped)


# -- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DiT-XL-2-256x256.pt", "pytorch_model.bin"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ValueError, match="pickled weights can run code"):
        init_from(ours(), tmp_path / name)
    with pytest.raises(ValueError, match=rf"python -m jobs\.convert {tmp_path / name} {tmp_path / name.rsplit('.', 1)[0]}\.safetensors$"):
        init_from(ours(), tmp_path / name)
    with pytest.raises(FileNotFoundError, match=rf"no safetensors file, only {name}; convert .* python -m jobs\.convert$"):
        init_from(ours(), tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        init_from(ours(), tmp_path / "absent.safetensors")


def refused(path: Path, tensors: dict[str, Tensor], model: DiT, match: str, config: dict[str, object] | None = None) -> None:
    save_file(tensors, path / "w.safetensors")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        init_from(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_does_not_fit_is_refused_by_name_and_nothing_is_changed(tmp_path: Path) -> None:
    whole = dit_file(0.1)
    refused(tmp_path, {"a": torch.zeros(1)}, ours(), "no known layout: .* but a$")
    refused(tmp_path, {k: v for k, v in whole.items() if k != "blocks.1.mlp.fc2.bias"}, ours(), r"\(dit\) lacks blocks\.1\.mlp\.fc2\.bias$")
    refused(tmp_path, whole | {"blocks.0.attn.q_norm.weight": torch.ones(8)}, ours(), r"unknown meaning: blocks\.0\.attn\.q_norm\.weight")
    refused(tmp_path, whole, ours(num_layers=4), "has 3 layers, this network 4")
    refused(tmp_path, whole, ours(hidden_size=64), r"layers\.0\.attn\.in_proj_weight is \(96, 32\) there, \(192, 64\) here")
    wide = whole | {"blocks.2.adaLN_modulation.1.weight": torch.zeros(9 * D, D)}
    refused(tmp_path, wide, ours(), r"blocks\.2\.adaLN_modulation\.1\.weight is \(288, 32\) there, \(192, 32\) here")
    refused(tmp_path, whole, ours(), "has 8 attention heads, this network 4", {"num_attention_heads": 8})
    refused(tmp_path, whole, ours(), r"has patches of 2, its config\.json patch_size 4", {"patch_size": 4})
    refused(tmp_path, whole, ours(), "has activation_fn 'gelu'; this network computes only 'gelu-approximate'", {"activation_fn": "gelu"})


def test_a_torn_file_and_a_tensor_in_two_files_are_refused(tmp_path: Path) -> None:
    save_file(dit_file(0.1), tmp_path / "a.safetensors")
    save_file({"pos_embed": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"pos_embed in more than one of a\.safetensors, b\.safetensors"):
        init_from(ours(), tmp_path)
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"b\.safetensors is not a whole safetensors file"):
        init_from(ours(), tmp_path / "b.safetensors")


def test_shards_of_one_file_are_read_together(tmp_path: Path) -> None:
    tensors = dit_file(0.1)
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, tmp_path / "m-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, tmp_path / "m-00002-of-00002.safetensors")
    model = ours()
    accounted(init_from(model, tmp_path), model, tensors)
