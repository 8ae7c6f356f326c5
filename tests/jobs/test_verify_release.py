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
    assert (out / "report.md").read_text() == text
    for routing in ("top-1", "top-2", "full"):
        pixels = np.asarray(Image.open(out / f"{routing}.png"))
        assert pixels.shape == (16, 16, 3)
        assert hashlib.sha256(pixels.tobytes()).hexdigest() in text
    # The pictures are the engine's.
    from paris_ray.inference.engine import ImageRequest, generate
    from paris_ray.inference.weights import load_model

    request = ImageRequest(release.PROMPT, seed=release.SEED, steps=2, guidance_scale=7.5, routing="full", solver="euler")
    assert np.array_equal(generate(load_model(checkpoint), [request])[0].image, np.asarray(Image.open(out / "full.png")))


def test_headers_only_draws_nothing(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(release, "load_model", lambda *a, **k: pytest.fail("loaded a model"))
    assert verify_release.main([str(checkpoint), "--no-pictures", "--out", str(tmp_path / "out")]) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.md"]
    assert "Pictures" not in capsys.readouterr().out


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
        "missing: vae/config.json",
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


def test_a_picture_that_is_one_colour_fails(copy, capsys):
    def flat(tensors):
        tensors["decoder.conv_out.weight"][:] = 0

    edit(next((copy / "vae").glob("*.safetensors")), flat)
    assert verify_release.main([str(copy), "--steps", "1"]) == 1
    assert capsys.readouterr().out.count("one flat colour") >= 3


def test_published_sizes_are_counted(tmp_path):
    """The published shapes at full size, the weights being a hole in the file; and one that has a tensor too few."""
    table = released.router_table(768, 12, 8, 32)
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "config.json").write_text(json.dumps(released.router_config(released.B, 8)))
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": 1, "image_size": 32, "num_channels": 4}))
    (tmp_path / "expert_0").mkdir()
    (tmp_path / "expert_0" / "config.json").write_text(json.dumps(released.expert_config(0, released.XL, 768)))
    released.write_hollow(tmp_path / "expert_0" / released.EXPERT_FILE, released.expert_table(1152, 28, 32, 768))
    released.write_hollow(tmp_path / "router" / released.ROUTER_FILE, table)
    report = release.verify(str(tmp_path), pictures=False)
    assert report.networks[0][3:] == ("605,970,448", "yes", "yes")
    found = {check.name: check for check in report.checks}
    assert found["expert_0: parameters"].holds
    assert found["expert_0: parameters"].found == "605,970,448, as published"
    assert found["expert_0: loads strictly"].holds
    assert found["router: parameters"].found == "129,136,904, as published"
    assert not found["router: loads strictly"].holds  # it knows eight experts, the checkpoint has one
    released.write_hollow(tmp_path / "router" / released.ROUTER_FILE, {k: v for k, v in table.items() if k != "cls_token"})
    (tmp_path / "expert_0" / released.EXPERT_FILE).unlink()
    found = {check.name: check for check in release.verify(str(tmp_path), pictures=False).checks}
    assert found["router: parameters"].found == "Mismatch: 129,136,136, published are 129,136,904"
    assert not found["expert_0: header"].holds


def test_nothing_there(tmp_path, capsys):
    assert verify_release.main([str(tmp_path / "nowhere")]) == 2
    assert "holds no file" in capsys.readouterr().err
