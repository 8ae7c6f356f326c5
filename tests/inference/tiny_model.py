"""A model folder made by the tests, with stand-ins for codec and text encoder that are functions of one row alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from paris_ray.inference.strict import load_router
from paris_ray.inference.weights import ParisModel
from paris_ray.models import DiT, Router
from paris_ray.storage import Folder

CHANNELS, SIZE, WIDTH, TOKENS = 3, 8, 24, 5
SHAPES = [{"hidden_size": 32, "num_layers": 2, "num_heads": 2}, {"hidden_size": 48, "num_layers": 1, "num_heads": 4}]


class Text:
    kind, width, max_length, pooling, fingerprint = "stand-in", WIDTH, TOKENS, "mean", "text"
    calls = 0

    def tokenize(self, captions):
        words = [[1, *(int(hashlib.sha256(w.encode()).hexdigest()[:4], 16) % 97 + 2 for w in c.split())][:TOKENS] for c in captions]
        ids = np.zeros((len(captions), TOKENS), np.int32)
        for row, w in enumerate(words):
            ids[row, : len(w)] = w
        return ids, np.array([len(w) for w in words], np.int32)

    def count(self, captions):
        return [1 + len(caption.split()) for caption in captions]

    def encode(self, ids, lengths):
        Text.calls += len(ids)
        table = torch.randn(99, WIDTH, generator=torch.Generator().manual_seed(3))
        mask = torch.arange(TOKENS)[None] < torch.as_tensor(lengths)[:, None]
        return table[torch.as_tensor(ids).long()] * mask[..., None]

    def pool(self, states, lengths):
        return states.sum(1) / torch.as_tensor(lengths)[:, None]


class Codec:
    kind, channels, downsampling, fingerprint = "stand-in", CHANNELS, 2, "codec"

    def decode(self, latents):
        pixels = (latents.float() * 60 + 128).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return pixels.repeat(2, axis=1).repeat(2, axis=2)


def random_weights(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=g) * 0.12
    return module


def write_network(folder: Path, module: torch.nn.Module, name: str, config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, folder / name)
    (folder / "config.json").write_text(json.dumps(config))


def expert_config(k: int, shape: dict, objective: str, schedule: str = "cosine") -> dict:
    return {
        "model_type": "dit_expert", "expert_id": k, "architecture": "dit", **shape, "patch_size": 2, "in_channels": CHANNELS,
        "out_channels": CHANNELS, "mlp_ratio": 4.0, "use_text_conditioning": True, "use_class_conditioning": False,
        "num_classes": 1000, "text_embed_dim": WIDTH,
        "use_dit_time_embed": True, "use_adaln_single": True, "cfg_dropout_prob": 0.1, "image_size": SIZE, "norm_eps": 1e-6,
        "objective": objective, "noise_schedule": schedule,
    }  # fmt: skip


def dit(shape: dict, seed: int) -> DiT:
    return random_weights(DiT(image_size=SIZE, in_channels=CHANNELS, out_channels=CHANNELS, text_embed_dim=WIDTH, **shape), seed)


def router_config(experts: int, text: bool) -> dict:
    return {
        "model_type": "router", "architecture": "dit", "num_clusters": experts, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "patch_size": 2,
        "in_channels": CHANNELS, "use_dit_time_embed": True, "image_size": SIZE, "norm_eps": 1e-6, "mlp_ratio": 4.0,
        "text_embed_dim": WIDTH if text else None,
    }  # fmt: skip


def write_model(path: Path, objectives=("flow", "ddpm", "flow", "flow"), text: bool = True) -> dict:
    """Experts, router, ``paris.json`` and null text; returns the info."""
    count = len(objectives)
    for k, objective in enumerate(objectives):
        shape = SHAPES[k % 2]
        schedule = "linear" if k == 3 else "cosine"
        write_network(path / f"expert_{k}", dit(shape, 10 + k), "diffusion_pytorch_model.safetensors", expert_config(k, shape, objective, schedule))
    router = Router(count, SIZE, 2, CHANNELS, 32, 1, 2, text_embed_dim=WIDTH if text else None)
    write_network(path / "router", random_weights(router, 5), "pytorch_model.safetensors", router_config(count, text))
    info = {
        "format": 1, "name": "stand-in", "num_experts": count, "image_size": 2 * SIZE, "latent": {"channels": CHANNELS, "size": SIZE},
        "codec": {"kind": "stand-in"}, "text": {"kind": "stand-in"}, "router": {"text": "pooled" if text else "none"},
        "sampling": {"steps": 4, "guidance_scale": 3.0, "routing": "top-2", "solver": "euler"},
        "experts": [{"index": k, "objective": o} for k, o in enumerate(objectives)],
    }  # fmt: skip
    (path / "paris.json").write_text(json.dumps(info))
    encoder = Text()
    ids, lengths = encoder.tokenize([""])
    save_file(
        {"states": encoder.encode(ids, lengths)[0], "token_ids": torch.tensor(ids[0]), "length": torch.tensor(lengths)},
        path / "null_text.safetensors",
    )
    return info


def open_model(path: Path, info: dict) -> ParisModel:
    encoder = Text()
    ids, lengths = encoder.tokenize([""])
    present = [(path / f"expert_{k}").exists() for k in range(info["num_experts"])]
    router = load_router(Folder(path) / "router", SIZE)
    return ParisModel(Folder(path), info, router, Codec(), encoder, encoder.encode(ids, lengths)[0], int(lengths[0]), present)
