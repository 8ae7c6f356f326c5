"""The paper's kinds of encoder (tiny, random, saved to disk) and a folder of images, from embed to a picture over HTTP."""

from __future__ import annotations

import base64
import io
import json
import socket

import httpx
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from paris_ray import config as configs
from paris_ray.data import schema
from paris_ray.storage import Folder

DINO = "vit_small_patch14_dinov2.lvd142m"
SIDE, COUNT = 32, 24

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    import timm
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoders")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3, "block_out_channels": (8, 8, 8)}
    AutoencoderKL(**blocks, latent_channels=4, norm_num_groups=4, scaling_factor=0.25, sample_size=SIDE).save_pretrained(path / "vae")
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=77,
        hidden_act="quick_gelu", bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    CLIPTextModel(text).save_pretrained(path / "text_encoder")
    backbone = timm.create_model(DINO, pretrained=False, num_classes=0).state_dict()
    # Layer scales start at 1e-5: an untrained backbone would say nearly the same of every picture.
    save_file({name: torch.ones_like(value) if name.endswith("gamma") else value for name, value in backbone.items()}, path / "dino.safetensors")
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two kinds of picture, so that there is something to cluster."""
    path, g = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(COUNT):
        kind = ("stripes", "spots")[i % 2]
        small = g.integers(0, 256, (12, 1, 3) if kind == "stripes" else (4, 5, 3)).astype(np.uint8)
        Image.fromarray(small).resize((40, 48), Image.Resampling.BICUBIC).save(path / f"{i:02d}.png")
        (path / f"{i:02d}.txt").write_text(f"{kind} number {i}")
    return path


@pytest.fixture(scope="module")
def run(ray_local, encoders, pictures, tmp_path_factory):
    """A whole run, each stage by its own function; Ray where the data are, training in this process."""
    from paris_ray.data.embed import embed
    from paris_ray.data.partition import partition
    from paris_ray.inference.assemble import assemble
    from paris_ray.stages import stage
    from paris_ray.training import worker
    from paris_ray.training.loop import Place

    folder = tmp_path_factory.mktemp("paper")
    overlay = {
        "preset": "tiny",
        "name": "paper",
        "run_dir": str(folder / "run"),
        "data": {
            "source": {"kind": "folder", "uri": str(pictures)},
            "image_size": SIDE,
            "embedding": {"kind": "timm", "model": DINO, "weights": str(encoders / "dino.safetensors"), "image_size": 28},
            "codec": {"kind": "vae", "source": str(encoders)},
            "text": {"kind": "clip", "source": str(encoders), "max_length": 16},
            "store_text": "token_ids",
        },
        "partition": {"fine": 4, "max_share": None},
        "expert": {"train": {"images": 16}},
        "experts": [{}, {"objective": "ddpm"}],
        "router": {"train": {"images": 16}},
        "evaluation": {"control_router": False},
    }
    (folder / "paper.yaml").write_text(yaml.safe_dump(overlay))
    config = configs.load(str(folder / "paper.yaml"))
    embed(config)
    partition(config)
    for name in ("expert-0", "expert-1", "router"):
        training = stage(config, name)
        training.begin()
        training.publish(worker.run(config, name, Place(torch.device("cpu"))), 0.0, result="export/")
    assemble(config)
    return config


def test_corpus_holds_what_the_libraries_say(run, encoders, pictures):
    import timm
    from diffusers import AutoencoderKL
    from timm.data import resolve_model_data_config

    corpus = schema.read_columns(Folder(run.run_dir) / "corpus", ["caption", "latent", "embedding", "source"])
    assert len(corpus["caption"]) == COUNT
    vae = AutoencoderKL.from_pretrained(encoders / "vae").eval()
    dino = timm.create_model(DINO, pretrained=False, num_classes=0, dynamic_img_size=True).eval()
    from safetensors.torch import load_file

    dino.load_state_dict(load_file(encoders / "dino.safetensors"))
    norm = resolve_model_data_config(dino)
    mean, std = (torch.tensor(norm[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    for i in range(0, COUNT, 7):
        row = list(corpus["caption"]).index((pictures / f"{i:02d}.txt").read_text())
        with Image.open(pictures / f"{i:02d}.png") as opened:
            # Short side to 32, centre of the rest: 32 × 38 → rows 3 to 35.
            image = opened.convert("RGB").resize((SIDE, 38), Image.Resampling.LANCZOS).crop((0, 3, SIDE, 3 + SIDE))
        x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            latent = vae.encode(x * 2 - 1).latent_dist.mean[0] * 0.25
        assert np.corrcoef(latent.numpy().ravel(), corpus["latent"][row].astype(np.float32).ravel())[0, 1] > 0.995
        small = torch.nn.functional.interpolate(x, size=(28, 28), mode="bicubic", antialias=True)
        with torch.no_grad():
            embedding = dino((small - mean) / std)[0].numpy()
        assert np.corrcoef(embedding, corpus["embedding"][row].astype(np.float32))[0, 1] > 0.99


def test_model_has_the_released_layout(run):
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    model = Folder(run.run_dir) / "model"
    names = {entry.name for entry in model.files(recursive=True)}
    assert {
        "config.json", "model_index.json", "expert_0/config.json", "expert_0/diffusion_pytorch_model.safetensors", "expert_1/config.json",
        "expert_1/diffusion_pytorch_model.safetensors", "router/config.json", "router/pytorch_model.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json", "text_encoder/model.safetensors",
    } <= names  # fmt: skip
    assert json.loads(model.read_bytes("config.json"))["num_experts"] == 2
    # The libraries that wrote the parts open them again.
    AutoencoderKL.from_pretrained(f"{model.path}/vae")
    CLIPTextModel.from_pretrained(f"{model.path}/text_encoder")
    CLIPTokenizer.from_pretrained(f"{model.path}/tokenizer")


def test_it_answers_over_http(run):
    from ray import serve

    from serve_app.app import Args, build

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(build(Args(model=f"{run.run_dir}/model", cpus=0.1, sampler_cpus=0.1)), name="paper", route_prefix="/")
        url = f"http://127.0.0.1:{port}/v1/images/generations"
        answer = httpx.post(url, json={"prompt": "stripes number 4", "seed": 0, "routing": "full"}, timeout=300)
        assert answer.status_code == 200, answer.text
        item = answer.json()["data"][0]
        with Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))) as image:
            assert image.size == (SIDE, SIDE)
            assert image.text["parameters"]
        assert len(item["routing"]) == run.sampling.steps
        assert all(abs(sum(step["weights"]) - 1) < 1e-3 and len(step["weights"]) == 2 for step in item["routing"])
        again = httpx.post(url, json={"prompt": "stripes number 4", "seed": 0, "routing": "full"}, timeout=300).json()["data"][0]
        assert again["b64_json"] == item["b64_json"]
    finally:
        serve.shutdown()
