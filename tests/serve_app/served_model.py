"""A whole model of random weights on disk, in the layout that serving reads: three unlike experts, patch-PCA codec, tiny CLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EXPERTS = 3
SIDE = 16
WIDTH = 32
TOKENS = 12
LATENT = {"channels": 4, "size": 8}
CLUSTERS = [40, 7, 13]


def _network(folder: Path, module: Any, config: dict[str, Any], file: str, seed: int) -> None:
    """Weights of which none is zero, so that text, time and position all matter."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    save_file({name: torch.randn(value.shape, generator=generator) * 0.12 for name, value in module.state_dict().items()}, folder / file)
    (folder / "config.json").write_text(json.dumps(config))


def _clip(folder: Path) -> None:
    """A text tower of random weights under transformers' names, without importing transformers."""
    import torch
    from safetensors.torch import save_file

    inner = 64
    shapes = {"embeddings.token_embedding.weight": (49408, WIDTH), "embeddings.position_embedding.weight": (TOKENS, WIDTH)}
    layer = "encoder.layers.0"
    for name, rows, columns in [(f"self_attn.{part}_proj", WIDTH, WIDTH) for part in ("q", "k", "v", "out")] + [
        ("mlp.fc1", inner, WIDTH),
        ("mlp.fc2", WIDTH, inner),
    ]:
        shapes |= {f"{layer}.{name}.weight": (rows, columns), f"{layer}.{name}.bias": (rows,)}
    for name in (f"{layer}.layer_norm1", f"{layer}.layer_norm2", "final_layer_norm"):
        shapes |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    save_file({f"text_model.{name}": torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}, folder / "model.safetensors")
    config = {"model_type": "clip_text_model", "hidden_size": WIDTH, "intermediate_size": inner, "num_hidden_layers": 1, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": TOKENS}))


def write_model(root: Path) -> None:
    """Write the model; deterministic."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from paris_ray.config import ClipText
    from paris_ray.config import PatchPcaCodec as PcaConfig
    from paris_ray.data.codec import PatchPcaCodec, PatchSums
    from paris_ray.data.text import build_text_encoder
    from paris_ray.models import DiT, Router

    latent = {"image_size": LATENT["size"], "patch_size": 2, "in_channels": LATENT["channels"], "text_embed_dim": WIDTH}
    for k, (width, layers, heads) in enumerate([(32, 2, 2), (32, 2, 2), (48, 1, 4)]):
        shape = {**latent, "hidden_size": width, "num_layers": layers, "num_heads": heads, "out_channels": LATENT["channels"]}
        kind = {"model_type": "dit_expert", "objective": "ddpm" if k == 1 else "flow", "noise_schedule": "cosine"}
        _network(root / f"expert_{k}", DiT(**shape), {**shape, **kind}, "diffusion_pytorch_model.safetensors", k)
    shape = {**latent, "num_clusters": EXPERTS, "hidden_size": 32, "num_layers": 1, "num_heads": 2}
    _network(root / "router", Router(**shape), {**shape, "model_type": "router"}, "pytorch_model.safetensors", 9)

    sums = PatchSums.zero(2)
    sums.add(np.random.default_rng(0).integers(0, 256, (64, SIDE, SIDE, 3), dtype=np.uint8), 2)
    codec = PatchPcaCodec.fit(PcaConfig(downsampling=2, channels=4), sums)
    codec.save(str(root))
    source = root.with_name(root.name + "-clip")
    _clip(source)
    text = build_text_encoder(ClipText(source=str(source), max_length=TOKENS))
    text.save(str(root))
    ids, lengths = text.tokenize([""])
    with torch.inference_mode():
        states = text.encode(torch.as_tensor(ids), torch.as_tensor(lengths))[0].clone()
    tensors = {"states": states, "token_ids": torch.as_tensor(ids)[0].clone(), "length": torch.as_tensor(lengths).clone()}
    save_file(tensors, root / "null_text.safetensors")
    info = {
        "format": 1,
        "name": "tiny",
        "num_experts": EXPERTS,
        "image_size": SIDE,
        "latent": LATENT,
        "codec": {**codec.meta(), "latent_size": LATENT["size"]},
        "text": text.meta(),
        "router": {"text": "pooled"},
        "sampling": {"steps": 4, "guidance_scale": 2.0, "routing": "top-2", "solver": "euler"},
        "experts": [
            {"index": k, "objective": "ddpm" if k == 1 else "flow", "noise_schedule": "cosine", "cluster_size": size, "fingerprint": f"expert-{k}"}
            for k, size in enumerate(CLUSTERS)
        ],
        "attribution": "Pictures of nobody",
        "model_fingerprint": "tiny-fingerprint",
    }
    (root / "paris.json").write_text(json.dumps(info))
