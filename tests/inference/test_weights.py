"""Strict loading, and a checkpoint in the released layout that the test writes from the published tensor table."""

from __future__ import annotations

import importlib.util
import json
import pickle
import types
from pathlib import Path

import numpy as np
import pytest
import tiny_model
import torch
from released import write_checkpoint
from safetensors.torch import load_file, save_file

from paris_ray.inference import weights
from paris_ray.inference.engine import ImageRequest, generate
from paris_ray.inference.strict import EXPERT_FILE, ROUTER_FILE, load_expert, load_router
from paris_ray.storage import Folder

SIZE = tiny_model.SIZE


@pytest.fixture
def expert(tmp_path):
    path = tmp_path / "expert_1"
    shape = tiny_model.SHAPES[0]
    tiny_model.write_network(path, tiny_model.dit(shape, 0), EXPERT_FILE, tiny_model.expert_config(1, shape, "ddpm", "linear"))
    return path


def edit(path, change):
    tensors = load_file(path / EXPERT_FILE)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, path / EXPERT_FILE)


def configure(path, **changes):
    config = {**json.loads((path / "config.json").read_text()), **changes}
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


def test_loaded_expert_is_the_saved_one(expert):
    module, objective = load_expert(Folder(expert), SIZE)
    saved = tiny_model.dit(tiny_model.SHAPES[0], 0)
    x, t, text = torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, 5, tiny_model.WIDTH)
    assert torch.equal(module(x, t, text), saved.eval()(x, t, text))
    assert (objective.name, objective.schedule_name) == ("ddpm", "linear")
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("t_block.1.bias"), r"tensor t_block\.1\.bias \(192,\) is missing from the file"),
        (lambda t: t.update(pos_embed=torch.zeros(1, 9, 32)), r"tensor pos_embed has shape \(1, 9, 32\) in the file, \(1, 16, 32\) in the network"),
        (lambda t: t.update(y_embedder=torch.zeros(2)), r"tensor y_embedder is in the file but not in the network"),
        (lambda t: t.update(pos_embed=torch.zeros(1, 16, 32, dtype=torch.int32)), r"tensor pos_embed is of type I32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(expert, change, message):
    edit(expert, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_expert(Folder(expert), SIZE)
    assert f"{expert}/{EXPERT_FILE}" in str(caught.value)
    assert "Use the weights and the config.json of one and the same network" in str(caught.value)


def test_extra_tensor_may_be_allowed_by_name(expert):
    edit(expert, lambda t: t.update(y_embedder=torch.zeros(2)))
    load_expert(Folder(expert), SIZE, ignore=("y_embedder",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_adaln_single": False}, "use_adaln_single = False is not supported; this code computes only True"),
        ({"use_class_conditioning": True}, "use_class_conditioning = True is not supported"),
        ({"architecture": "unet"}, "architecture = 'unet' is not supported"),
        ({"qk_norm": True}, "unknown setting qk_norm = True, which may change"),
        ({"objective": "x0"}, "objective: 'x0' is not one of flow, ddpm"),
        ({"patch_size": 3}, "image_size 8 must be a multiple of patch_size 3"),
        ({"num_layers": 3}, r"tensor layers\.2\.\S+ .* is missing from the file"),
    ],
)
def test_settings_that_change_the_maths_are_refused(expert, changes, message):
    configure(expert, **changes)
    with pytest.raises(ValueError, match=message):
        load_expert(Folder(expert), SIZE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 20_000, "patch_size": 1}, "image_size is 20000, the rest of the model has 8; take all parts from one model"),
        ({"patch_size": 1}, r"tensor pos_embed has shape \(1, 16, 32\) in the file, \(1, 64, 32\) in the network"),
        ({"hidden_size": 10**9}, r"tensor pos_embed has shape \(1, 16, 32\) in the file, \(1, 16, 1000000000\) in the network"),
        ({"num_layers": 10**7}, "num_layers is 10000000; at most 1024 are made"),
        ({"patch_size": 0}, "patch_size is 0; it must be a whole number above 0"),
        ({"num_layers": "2"}, "num_layers is '2'; it must be a whole number above 0"),
        ({"mlp_ratio": 1e400}, "config.json: "),
    ],
)
@pytest.mark.parametrize("weights_there", [True, False])
def test_a_config_takes_no_more_memory_than_its_weights(expert, monkeypatch, changes, message, weights_there):
    """Even without weights a network has a table of positions, and takes time for each layer."""
    configure(expert, **changes)
    if "mlp_ratio" not in changes:
        monkeypatch.setattr("paris_ray.models.dit.sincos_positions", lambda *a: pytest.fail("made"))
    if not weights_there:
        (expert / EXPERT_FILE).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=message if weights_there else f"{message}|does not exist"):
        load_expert(Folder(expert), SIZE)


def test_an_unknown_setting_may_be_allowed_by_name(expert):
    configure(expert, ema_decay=0.9999, qk_norm=True)
    with pytest.raises(ValueError, match=r"unknown setting qk_norm = True.*allow it by name \(ignore_settings=\('qk_norm',\)\)"):
        load_expert(Folder(expert), SIZE, ignore_settings=("ema_decay",))
    module, _ = load_expert(Folder(expert), SIZE, ignore_settings=("ema_decay", "qk_norm"))
    # Of a known one nothing is ignored: neither what this code does not compute, nor what the network is built by.
    assert len(load_expert(Folder(expert), SIZE, ignore_settings=("ema_decay", "qk_norm", "num_layers"))[0].layers) == len(module.layers)
    configure(expert, use_class_conditioning=True)
    with pytest.raises(ValueError, match="use_class_conditioning = True is not supported"):
        load_expert(Folder(expert), SIZE, ignore_settings=("ema_decay", "qk_norm", "use_class_conditioning"))


def test_epsilon_of_the_norms(expert):
    """The one asked for, else the config's, else 1e-6."""

    def used(norm_eps):
        module, _ = load_expert(Folder(expert), SIZE, norm_eps=norm_eps)
        return {layer.eps for layer in module.modules() if isinstance(layer, torch.nn.LayerNorm)}

    configure(expert, norm_eps=1e-4)
    assert used(None) == {1e-4}
    assert used(1e-5) == {1e-5}
    configure(expert, norm_eps="gone")
    assert used(None) == {1e-6}
    for wrong in (0.0, -1.0, 2.0):
        with pytest.raises(ValueError, match=f"norm_eps: {wrong} must be between 0 and 1"):
            used(wrong)


def test_settings_that_are_off_or_do_not_matter_pass(expert):
    configure(expert, qk_norm=False, learn_sigma=None, cfg_dropout_prob=0.3, _diffusers_version="0.30")
    load_expert(Folder(expert), SIZE)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt"])
def test_pickles_are_refused_unread(expert, name):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (expert / "exploded",))

    (expert / EXPERT_FILE).unlink()
    (expert / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=f"{name} is refused: pickled weights can run code"):
        load_expert(Folder(expert), SIZE)
    with pytest.raises(ValueError, match="is refused"):
        weights.load_model(expert / name)
    assert not (expert / "exploded").exists()


def test_missing_and_cut_files(expert):
    whole = (expert / EXPERT_FILE).read_bytes()
    (expert / EXPERT_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_expert(Folder(expert), SIZE)
    (expert / EXPERT_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=EXPERT_FILE):
        load_expert(Folder(expert), SIZE)


def test_experts_must_fit_the_model(tmp_path):
    info = tiny_model.write_model(tmp_path)
    model = tiny_model.open_model(tmp_path, info)
    configure(tmp_path / "expert_0", objective="ddpm")
    with pytest.raises(ValueError, match=r"objective is 'ddpm', paris.json says 'flow'"):
        model.load_expert(0)
    with pytest.raises(ValueError, match="expert 7: there are experts 0…3"):
        model.load_expert(7)
    model.null_text = torch.zeros(5, 99)
    with pytest.raises(ValueError, match="text_embed_dim is 24, the rest of the model has 99"):
        model.load_expert(2)


# -- the released layout ------------------------------------------------------------------------------------------------

L, HEADS, LATENT, TEXT = 2, 2, 8, 32


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A checkpoint as published, at toy size: no paris.json, no image_size in the experts, diffusers' VAE, transformers' CLIP."""
    path = tmp_path_factory.mktemp("released") / "paris"
    write_checkpoint(path)
    return path


def second_implementation(kind):
    import sys

    folder = Path(__file__).parents[1] / "models"
    package = types.ModuleType("second_implementation")
    package.__path__ = [str(folder)]
    sys.modules.setdefault("second_implementation", package)
    return importlib.import_module(f"second_implementation.test_{kind}").reference


def test_released_layout_loads_with_its_facts(released):
    model = weights.load_model(released)
    assert model.num_experts == 3
    assert model.latent_shape == (4, LATENT, LATENT)
    assert model.image_size == 2 * LATENT
    assert not model.router_reads_text
    assert model.present == [True] * 3
    assert (model.codec.kind, model.text_encoder.kind) == ("vae", "clip")
    assert model.defaults == {"steps": 50, "guidance_scale": 7.5, "routing": "top-2", "solver": "euler"}
    assert all(spec["objective"] == "flow" for spec in model.info["experts"])
    assert model.null_text.shape == (12, TEXT)
    assert model.null_length == 2


def test_released_experts_are_what_their_own_configs_say(released, tmp_path):
    """A released layout without paris.json may hold experts that predict noise."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(released, copy)
    configure(copy / "expert_0", objective="ddpm", noise_schedule="linear")
    configure(copy / "expert_1", objective="ddpm")
    model, experts = weights.load_model(copy), weights.open_experts(copy)
    assert [(spec["objective"], spec["noise_schedule"]) for spec in model.info["experts"]] == [
        ("ddpm", "linear"), ("ddpm", "cosine"), ("flow", "cosine")]  # fmt: skip
    for source in (model, experts):
        found = [source.load_expert(k)[1] for k in range(3)]
        assert [meaning.name for meaning in found] == ["ddpm", "ddpm", "flow"]
        assert [meaning.schedule_name for meaning in found[:2]] == ["linear", "cosine"]
    assert generate(model, [ImageRequest("a cat", seed=1, steps=2, routing="full")])[0].degraded == []


def test_epsilon_and_settings_reach_every_network_of_a_model(released, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(released, copy)
    for name in ("expert_0", "expert_1", "expert_2", "router"):
        configure(copy / name, ema_decay=0.9999)
    with pytest.raises(ValueError, match="unknown setting ema_decay"):
        weights.load_model(copy)
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 4, LATENT, LATENT, generator=g, dtype=torch.float64), torch.tensor([0.3, 1.0], dtype=torch.float64)
    text = torch.randn(2, 12, TEXT, generator=g, dtype=torch.float64)

    def raw(path):
        tensors = {name: tensor.double() for name, tensor in load_file(path).items()}
        return types.SimpleNamespace(state_dict=lambda: tensors, patch_size=2, layers=range(L), out_channels=4)

    options = {"ignore_settings": ("ema_decay",), "norm_eps": 1e-2}
    model = weights.load_model(copy, **options)
    expected = second_implementation("dit")(raw(copy / "expert_2" / EXPERT_FILE), HEADS, 1e-2, x, t, text)
    for source in (model, weights.open_experts(copy, **options)):
        torch.testing.assert_close(source.load_expert(2)[0].double()(x, t, text), expected)
    expected = second_implementation("router")(raw(copy / "router" / ROUTER_FILE), HEADS, 1e-2, x, t, None)
    torch.testing.assert_close(model.router.double()(x, t), expected)


def test_encoders_that_are_not_whole_are_refused_by_file(released, tmp_path):
    """The messages name the file, not the key of some run's config."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(released, copy)
    file = next((copy / "vae").glob("*.safetensors"))
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if name != "decoder.conv_out.weight"}, file)
    with pytest.raises(ValueError, match=r"copy/vae/\S+ does not fit(.|\n)*tensor decoder\.conv_out\.weight \S.* is missing") as caught:
        weights.load_model(copy)
    assert "data." not in str(caught.value)
    save_file(tensors, file)
    configure(copy / "text_encoder", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"copy/text_encoder/model\.safetensors does not fit(.|\n)*encoder\.layers\.1\.") as caught:
        weights.load_model(copy)
    assert "data." not in str(caught.value)


def test_released_networks_compute_what_a_second_implementation_does(released):
    model = weights.load_model(released)
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 4, LATENT, LATENT, generator=g, dtype=torch.float64), torch.tensor([0.3, 1.0], dtype=torch.float64)
    text = torch.randn(2, 12, TEXT, generator=g, dtype=torch.float64)

    def raw(path):
        tensors = {name: tensor.double() for name, tensor in load_file(path).items()}
        return types.SimpleNamespace(state_dict=lambda: tensors, patch_size=2, layers=range(L), out_channels=4)

    module, objective = model.load_expert(2)
    assert objective.name == "flow"
    expected = second_implementation("dit")(raw(released / "expert_2" / EXPERT_FILE), HEADS, 1e-6, x, t, text)
    torch.testing.assert_close(module.double()(x, t, text), expected)
    expected = second_implementation("router")(raw(released / "router" / ROUTER_FILE), HEADS, 1e-6, x, t, None)
    torch.testing.assert_close(model.router.double()(x, t), expected)


def test_released_model_draws_and_its_text_is_transformers(released):
    from transformers import CLIPTextModel

    model = weights.load_model(released)
    ids, lengths = model.text_encoder.tokenize(["a photo of a cat"])
    theirs = CLIPTextModel.from_pretrained(released / "text_encoder").eval()(torch.tensor(ids).long()).last_hidden_state
    torch.testing.assert_close(model.text_encoder.encode(torch.tensor(ids), torch.tensor(lengths)), theirs, rtol=1e-4, atol=1e-5)
    requests = [ImageRequest("a photo of a cat", seed=1, index=i, steps=2) for i in range(3)]
    results = generate(model, requests)
    assert results[0].image.shape == (16, 16, 3)
    alone = generate(weights.load_model(released), requests[2:])[0]
    assert np.array_equal(alone.image, results[2].image)


def test_released_model_without_a_part(released, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(released, copy)
    shutil.rmtree(copy / "expert_1")
    assert weights.load_model(copy).present == [True, False, True]
    (copy / "expert_1").mkdir()
    shutil.copy(copy / "expert_0" / EXPERT_FILE, copy / "expert_1")
    with pytest.raises(FileNotFoundError, match=r"expert_1 has files but no config.json; add it, or remove the folder"):
        weights.load_model(copy)
    shutil.rmtree(copy / "expert_1")
    (copy / "expert_2" / EXPERT_FILE).rename(copy / "expert_2" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="is refused"):
        weights.load_model(copy)
    shutil.rmtree(copy / "vae")
    with pytest.raises(FileNotFoundError, match=r"neither paris.json nor vae"):
        weights.load_model(copy)
    with pytest.raises(FileNotFoundError, match="holds no model"):
        weights.load_model(tmp_path / "nowhere")


def test_router_must_know_the_experts(released, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(released, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_experts": 2}))
    with pytest.raises(ValueError, match="num_clusters is 3, the rest of the model has 2"):
        weights.load_model(copy)
    assert load_router(Folder(copy / "router"), LATENT).num_clusters == 3


def test_making_networks_for_loading_does_not_import_sympy(expert):
    """It would, by way of initial values on the meta device, and take seconds in every process."""
    import subprocess
    import sys

    code = f"""
import sys
from paris_ray.inference.strict import load_expert
from paris_ray.storage import Folder
load_expert(Folder({str(expert)!r}), {SIZE})
print("sympy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
