"""The diffusers face beside the plain modules: the same folders, tensors and outputs, and no diffusers for those who do not ask for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from paris_ray.models import DiT, Router
from paris_ray.models.diffusers_face import ParisDiTModel, ParisRouterModel

# As in the released configs, made small.
EXPERT = {
    "model_type": "dit_expert", "expert_id": 1, "architecture": "dit", "hidden_size": 32, "num_layers": 2, "num_heads": 4, "patch_size": 2,
    "in_channels": 4, "out_channels": 4, "mlp_ratio": 4.0, "use_text_conditioning": True, "use_class_conditioning": False, "num_classes": 1000,
    "text_embed_dim": 12, "use_dit_time_embed": True, "use_adaln_single": True, "cfg_dropout_prob": 0.1,
}  # fmt: skip
ROUTER = {
    "model_type": "router", "architecture": "dit", "num_clusters": 8, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "patch_size": 2,
    "in_channels": 4, "use_dit_time_embed": True,
}  # fmt: skip
CASES = [
    (ParisDiTModel, DiT, EXPERT, "diffusion_pytorch_model.safetensors", (torch.randn(2, 5, 12),)),
    (ParisRouterModel, Router, ROUTER, "pytorch_model.safetensors", ()),
]


def plain(kind: type, config: dict, path: Path, name: str) -> nn.Module:
    """The plain module at random, and its folder, written without diffusers."""
    shape = {key: value for key, value in config.items() if key in kind.__init__.__annotations__}
    torch.manual_seed(0)
    model = kind(**shape)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    path.mkdir()
    save_file(model.state_dict(), path / name)
    (path / "config.json").write_text(json.dumps(config))
    return model.eval()


@pytest.mark.parametrize(("face", "kind", "config", "name", "more"), CASES)
def test_a_released_folder_loads_and_saves_with_the_same_outputs(tmp_path: Path, face, kind, config, name, more) -> None:
    model = plain(kind, config, tmp_path / "released", name)
    loaded = face.from_pretrained(tmp_path / "released")
    x, t = torch.randn(2, 4, 32, 32), torch.tensor([0.2, 1.0])
    with torch.no_grad():
        expected = model(x, t, *more)
        assert torch.equal(loaded(x, t, *more), expected)
    assert not loaded.training
    loaded.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == sorted(["config.json", name])
    saved = load_file(tmp_path / "saved" / name)
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    written = json.loads((tmp_path / "saved/config.json").read_text())
    assert {key: written[key] for key in config} == config
    with torch.no_grad():
        assert torch.equal(face.from_pretrained(tmp_path, subfolder="saved")(x, t, *more), expected)


@pytest.mark.parametrize(("face", "kind", "config", "name", "more"), CASES)
def test_a_missing_or_unknown_tensor_or_setting_is_refused_by_name(tmp_path: Path, face, kind, config, name, more) -> None:
    tensors = plain(kind, config, tmp_path / "m", name).state_dict()
    save_file({key: value for key, value in tensors.items() if key != "layers.1.mlp.2.bias"}, tmp_path / "m" / name)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.2\.bias"):
        face.from_pretrained(tmp_path / "m")
    save_file(tensors | {"surplus": torch.zeros(1)}, tmp_path / "m" / name)
    with pytest.raises(ValueError, match=r"surplus"):
        face.from_pretrained(tmp_path / "m")
    save_file(tensors | {"layers.0.attn.in_proj_bias": torch.zeros(95)}, tmp_path / "m" / name)
    with pytest.raises(ValueError, match=r"tensor layers\.0\.attn\.in_proj_bias has shape \(95,\) in the file, \(96,\) in the network$"):
        face.from_pretrained(tmp_path / "m")
    save_file(tensors, tmp_path / "m" / name)
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"qk_norm": True}))
    with pytest.raises(ValueError, match="unknown setting qk_norm = True"):
        face.from_pretrained(tmp_path / "m")
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"architecture": "unet"}))
    with pytest.raises(ValueError, match="architecture = 'unet' is not supported"):
        face.from_pretrained(tmp_path / "m")
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    (tmp_path / "m" / name).rename(tmp_path / "m" / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match=r"safetensors"):
        face.from_pretrained(tmp_path / "m")


def test_what_diffusers_saves_is_read_by_the_strict_loader(tmp_path: Path) -> None:
    from paris_ray.inference.strict import load_expert, load_router
    from paris_ray.storage import Folder

    expert, router = plain(DiT, EXPERT, tmp_path / "e", CASES[0][3]), plain(Router, ROUTER, tmp_path / "r", CASES[1][3])
    ParisDiTModel.from_pretrained(tmp_path / "e").save_pretrained(tmp_path / "e2")
    ParisRouterModel.from_pretrained(tmp_path / "r").save_pretrained(tmp_path / "r2")
    for mine, theirs in ((expert, load_expert(Folder(tmp_path / "e2"), 32)[0]), (router, load_router(Folder(tmp_path / "r2"), 32))):
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in mine.state_dict().items())


@pytest.mark.parametrize(("face", "kind", "config", "name", "more"), CASES)
def test_gradient_checkpointing_is_switched_by_diffusers_method(face, kind, config, name, more) -> None:
    model = face(**{**config, "image_size": 8})
    assert not model.gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.gradient_checkpointing


@pytest.mark.parametrize(("face", "kind", "config", "name", "more"), CASES)
def test_repeated_blocks_are_compiled_by_diffusers_method(face, kind, config, name, more) -> None:
    """All of them and nothing else, as one graph."""
    torch.manual_seed(0)
    model = face(**{**config, "image_size": 8}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 1.0])
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(x, t, *more)
        model.compile_repeated_blocks(fullgraph=True, backend=keep)
        torch.testing.assert_close(model(x, t, *more), expected, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1
    assert [module for module in model.modules() if module._compiled_call_impl is not None] == list(model.layers)
    assert {type(layer).__name__ for layer in model.layers} == set(face._no_split_modules)


def test_direct_construction_is_as_strict() -> None:
    with pytest.raises(ValueError, match="use_adaln_single = False is not supported"):
        ParisDiTModel(**{**EXPERT, "image_size": 8, "use_adaln_single": False})
    with pytest.raises(ValueError, match="hidden_size 32 must be a multiple of num_heads 5"):
        ParisRouterModel(**{**ROUTER, "num_heads": 5})


def test_importing_the_models_does_not_import_diffusers() -> None:
    code = "import sys, paris_ray.models, paris_ray.models.init_from; print(sorted({'diffusers', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
