"""The verification against checkpoints written from the published table: whole, and broken in each way that a download can be."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from jobs import verify_release
from paris_ray.inference import release
from paris_ray.inference.weights import load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
import released


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("release") / "paris"
    released.write_checkpoint(path)
    return path


@pytest.fixture
def copy(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "somebodys-folder")
    return tmp_path / "somebodys-folder"


def test_files_are_compared_with_the_list_beside_them(copy, capsys):
    """A model of our own has one; the released checkpoint does not."""
    from paris_ray.manifest import Stage
    from paris_ray.storage import Folder

    assert verify_release.main([str(copy), "--no-pictures"]) == 0
    assert "_manifest.json" not in capsys.readouterr().out
    Stage("assemble", Folder(copy), {}, {}).publish()
    assert verify_release.main([str(copy), "--no-pictures"]) == 0
    assert "files are those of _manifest.json" in capsys.readouterr().out
    file = copy / "expert_0" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert verify_release.main([str(copy), "--no-pictures"]) == 1
    assert "expert_0/diffusion_pytorch_model.safetensors has another checksum than its manifest says, by _manifest.json" in capsys.readouterr().out


def test_a_whole_checkpoint(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    assert verify_release.main([str(checkpoint), "--out", str(out), "--steps", "2", "--max-resident", "1"]) == 0
    text = capsys.readouterr().out
    assert "# Verification of Paris" in text
    assert "checks hold.**" in text
    assert str(checkpoint) not in text
    for file in checkpoint.rglob("*"):
        if file.is_file():
            assert f"| {file.relative_to(checkpoint)} | {file.stat().st_size:,} | `{hashlib.sha256(file.read_bytes()).hexdigest()}` |" in text
    parameters = sum(int(np.prod(s)) for s in released.expert_table(16, 2).values())
    assert f"| expert_1 | 40 | F32 | {parameters:,} | another size | yes |" in text
    for part in ("vae", "text_encoder"):
        tensors = load_file(next((checkpoint / part).glob("*.safetensors")))
        assert f"| {part} | {len(tensors)} | F32 | {sum(t.size for t in tensors.values()):,} | another size | yes |" in text
    assert "fp32 on a CPU with 1 thread" in text
    assert (out / "report.md").read_text() == text
    for routing in ("top-1", "top-2", "full"):
        pixels = np.asarray(Image.open(out / f"{routing}.png"))
        assert pixels.shape == (16, 16, 3)
        assert hashlib.sha256(pixels.tobytes()).hexdigest() in text
    # The pictures are the engine's.
    from paris_ray.inference.engine import ImageRequest, generate

    request = ImageRequest(release.PROMPT, seed=release.SEED, steps=2, guidance_scale=7.5, routing="full", solver="euler")
    assert np.array_equal(generate(load_model(checkpoint), [request])[0].image, np.asarray(Image.open(out / "full.png")))


def test_headers_only_draws_nothing(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(release, "load_model", lambda *a, **k: pytest.fail("loaded a model"))
    assert verify_release.main([str(checkpoint), "--no-pictures", "--out", str(tmp_path / "out")]) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.md"]
    assert "Pictures" not in capsys.readouterr().out


def test_weights_of_the_encoders_are_looked_at_without_reading_them(copy, capsys, monkeypatch):
    monkeypatch.setattr(release, "load_model", lambda *a, **k: pytest.fail("loaded a model"))
    vae, text = (next((copy / part).glob("*.safetensors")) for part in ("vae", "text_encoder"))
    whole = vae.read_bytes(), text.read_bytes()
    vae.unlink()
    text.unlink()
    assert verify_release.main([str(copy), "--no-pictures"]) == 1
    assert "missing: vae/diffusion_pytorch_model.safetensors, text_encoder/model.safetensors" in capsys.readouterr().out
    vae.write_bytes(whole[0][:-1000])
    text.write_bytes(whole[1][:-1000])
    assert verify_release.main([str(copy), "--no-pictures"]) == 1
    found = capsys.readouterr().out
    for part, name in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        assert f"**{part}: header**: ValueError: {part}/{name}.safetensors is not a whole safetensors file" in found
    vae.write_bytes(whole[0])
    text.write_bytes(whole[1])
    edit(vae, lambda t: t.update({"decoder.conv_in.bias": np.zeros(3, np.float32)}))
    config = json.loads((copy / "text_encoder" / "config.json").read_text())
    (copy / "text_encoder" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    assert verify_release.main([str(copy), "--no-pictures"]) == 1
    failures = capsys.readouterr().out.partition("## What fails")[2].partition("## Networks")[0]
    assert "**vae: loads strictly**: ValueError: vae/diffusion_pytorch_model.safetensors does not fit" in failures
    assert "tensor decoder.conv_in.bias has shape (3,) in the file, (8,) in the network" in failures
    assert "**text_encoder: loads strictly**: ValueError: text_encoder/model.safetensors does not fit" in failures
    assert failures.count("\n- **") == 2


def test_epsilon_settings_and_threads(copy, tmp_path, capsys):
    """What was asked for beside the rule is in the report, and the picture is drawn with it."""
    import torch

    from paris_ray.inference.engine import Engine, ImageRequest, generate
    from paris_ray.inference.experts import LocalExperts

    file = copy / "expert_1" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "ema_decay": 0.9999}))
    arguments = [str(copy), "--steps", "1", "--norm-eps", "0.01", "--threads", "2"]
    assert verify_release.main(arguments) == 1
    assert "unknown setting ema_decay" in capsys.readouterr().out
    assert torch.get_num_threads() == 2
    assert verify_release.main([*arguments, "--ignore-setting", "ema_decay", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "Run with settings allowed besides: ema_decay; epsilon of the norms: 0.01." in text
    assert "fp32 on a CPU with 2 threads" in text
    request = ImageRequest(release.PROMPT, seed=release.SEED, steps=1, guidance_scale=7.5, routing="full", solver="euler")
    model = load_model(copy, ignore_settings=("ema_decay",), norm_eps=0.01)
    (expected,) = generate(Engine(model, LocalExperts(model, threads=2, lazy=True)), [request])
    torch.set_num_threads(1)
    assert np.array_equal(expected.image, np.asarray(Image.open(tmp_path / "out" / "full.png")))


def test_networks_before_training_are_whole(copy, capsys):
    """Some of their matrices are zero by design: said, and no failure."""
    import torch

    from paris_ray.models import DiT, Router

    torch.manual_seed(0)
    fresh = DiT(8, text_embed_dim=released.TEXT, **released.TINY)
    edit(copy / "expert_0" / released.EXPERT_FILE, lambda t: t.update({n: p.detach().numpy() for n, p in fresh.named_parameters()}))
    fresh = Router(3, 8, **released.TINY)
    edit(copy / "router" / released.ROUTER_FILE, lambda t: t.update({n: p.detach().numpy() for n, p in fresh.named_parameters()}))
    assert verify_release.main([str(copy), "--steps", "1"]) == 0
    text = capsys.readouterr().out
    assert (
        "all zeros, as before training: final_layer.linear.weight, layers.0.cross_attn.out_proj.weight, layers.1.cross_attn.out_proj.weight"
    ) in text
    assert "all zeros, as before training: layers.0.adaLN_modulation.1.weight, layers.1.adaLN_modulation.1.weight" in text


def edit(file, change):
    tensors = dict(load_file(file))
    change(tensors)
    save_file(tensors, file)


def test_every_failure_is_named_and_it_goes_on_to_the_end(copy, capsys):
    edit(copy / "expert_0" / released.EXPERT_FILE, lambda t: t.pop("t_block.1.bias"))
    whole = (copy / "expert_1" / released.EXPERT_FILE).read_bytes()
    (copy / "expert_1" / released.EXPERT_FILE).write_bytes(whole[:-1000])
    edit(copy / "expert_2" / released.EXPERT_FILE, lambda t: t.update({"layers.1.mlp.0.weight": np.full((64, 16), np.nan, np.float32)}))
    edit(copy / "router" / released.ROUTER_FILE, lambda t: t.update(extra=np.zeros(3, np.float32)))
    shutil.rmtree(copy / "vae")
    (copy / "training_state.pt").write_bytes(b"anything")
    assert verify_release.main([str(copy), "--steps", "1"]) == 1
    text = capsys.readouterr().out
    failures = text.partition("## What fails")[2].partition("## Networks")[0]
    for what in (
        "**expert_0: loads strictly**: ValueError: expert_0/diffusion_pytorch_model.safetensors does not fit",
        "tensor t_block.1.bias (96,) is missing",
        "**expert_1: header**",
        "**expert_1: loads strictly**",
        "tensor layers.1.mlp.0.weight has values that are not finite",
        "**router: loads strictly**",
        "tensor extra is in the file but not in the network",
        "missing: vae/config.json, vae/diffusion_pytorch_model.safetensors",
        "training_state.pt: pickled weights",
        "**VAE and text encoder load**",
        "**picture with full**: not drawn",
    ):
        assert what in failures, what
    assert str(copy) not in text
    assert f"{failures.count(chr(10) + '- **')} of " in text


def test_a_hole_in_a_download_and_an_allowed_tensor(copy, capsys):
    edit(copy / "router" / released.ROUTER_FILE, lambda t: t.update(extra=np.zeros(3, np.float32)))
    assert verify_release.main([str(copy), "--no-pictures", "--ignore-tensor", "extra"]) == 0
    edit(copy / "expert_2" / released.EXPERT_FILE, lambda t: t["layers.0.attn.in_proj_weight"].fill(0))
    assert verify_release.main([str(copy), "--steps", "1", "--ignore-tensor", "extra"]) == 1
    assert "tensor layers.0.attn.in_proj_weight is all zeros" in capsys.readouterr().out
    edit(next((copy / "text_encoder").glob("*.safetensors")), lambda t: next(x for x in t.values() if x.ndim == 2).fill(0))
    assert verify_release.main([str(copy), "--steps", "1", "--ignore-tensor", "extra"]) == 1
    assert "**text_encoder: loads strictly**: Mismatch: tensor" in capsys.readouterr().out


def test_a_picture_that_is_one_colour_fails(copy, capsys):
    def flat(tensors):
        tensors["decoder.conv_out.weight"][:] = 0

    edit(next((copy / "vae").glob("*.safetensors")), flat)
    assert verify_release.main([str(copy), "--steps", "1"]) == 1
    assert capsys.readouterr().out.count("one flat colour") >= 3


def test_published_sizes_are_counted(tmp_path):
    """The published shapes at full size, the weights being a hole in the file; and one that has a tensor too few."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    table = released.router_table(768, 12, 8, 32)
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "config.json").write_text(json.dumps(released.router_config(released.B, 8)))
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": 1, "image_size": 32, "num_channels": 4}))
    (tmp_path / "expert_0").mkdir()
    (tmp_path / "expert_0" / "config.json").write_text(json.dumps(released.expert_config(0, released.XL, 768)))
    released.write_hollow(tmp_path / "expert_0" / released.EXPERT_FILE, released.expert_table(1152, 28, 32, 768))
    released.write_hollow(tmp_path / "router" / released.ROUTER_FILE, table)
    # The other two as their own libraries build them from the published configs.
    with torch.device("meta"):
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
        sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}
        text = CLIPTextModel(CLIPTextConfig(**sizes))
    for part, module, name in (("vae", vae, "diffusion_pytorch_model.safetensors"), ("text_encoder", text, "model.safetensors")):
        module.save_config(tmp_path / part) if part == "vae" else module.config.save_pretrained(tmp_path / part)
        released.write_hollow(tmp_path / part / name, {n: x.shape for n, x in module.state_dict().items()})
    report = release.verify(str(tmp_path), pictures=False)
    assert report.networks[0][3:] == ("605,970,448", "yes", "yes")
    found = {check.name: check for check in report.checks}
    assert found["expert_0: parameters"].holds
    assert found["expert_0: parameters"].found == "605,970,448, as published"
    assert found["expert_0: loads strictly"].holds
    assert found["router: parameters"].found == "129,136,904, as published"
    assert report.networks[2][:1] + report.networks[2][3:] == ("vae", "83,653,863", "yes", "yes")
    assert report.networks[3][:1] + report.networks[3][3:] == ("text_encoder", "123,060,480", "yes", "yes")
    assert not found["router: loads strictly"].holds  # it knows eight experts, the checkpoint has one
    released.write_hollow(tmp_path / "router" / released.ROUTER_FILE, {k: v for k, v in table.items() if k != "cls_token"})
    (tmp_path / "expert_0" / released.EXPERT_FILE).unlink()
    found = {check.name: check for check in release.verify(str(tmp_path), pictures=False).checks}
    assert found["router: parameters"].found == "Mismatch: 129,136,136, published are 129,136,904"
    assert not found["expert_0: header"].holds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--steps", "0"], "steps: 0 must be at least 1"), (["--threads", "0"], "threads: 0"), (["--max-resident", "0"], "max_resident: 0"),
     (["--norm-eps", "-1"], "norm_eps: -1.0 must be between 0 and 1"), (["--device", "gpu"], "device: 'gpu' is none that torch knows"),
     (["--out", __file__], "test_verify_release.py is a file; name a folder")],
)  # fmt: skip
def test_bad_arguments_are_refused_before_anything_is_read(tmp_path, capsys, arguments, message):
    (tmp_path / "config.json").write_text("{}")
    assert verify_release.main([str(tmp_path), *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert not said.out


def test_the_folder_of_a_run_is_not_its_model(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    for name in ("model/config.json", "model/paris.json"):
        (tmp_path / name).write_text("{}")
    assert verify_release.main([str(tmp_path)]) == 2
    assert f"is the folder of a run; give its model, {tmp_path}/model" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="is the folder of a run; give its model"):
        load_model(tmp_path)


def test_nothing_there(tmp_path, capsys):
    assert verify_release.main([str(tmp_path / "nowhere")]) == 2
    assert "holds no file" in capsys.readouterr().err
