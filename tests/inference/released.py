"""A checkpoint as it was published, written from the published tensor table alone: no code of the project, no ``paris.json``, any size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

EXPERT_FILE, ROUTER_FILE = "diffusion_pytorch_model.safetensors", "pytorch_model.safetensors"
XL = {"hidden_size": 1152, "num_layers": 28, "num_heads": 16}
B = {"hidden_size": 768, "num_layers": 12, "num_heads": 12}
TINY = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}
TEXT = 32
MODEL_INDEX = {"_class_name": "DDMPipeline", "_diffusers_version": "0.30.0", "num_experts": 8, "scheduler": ["diffusers", "DDIMScheduler"],
               "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
               "tokenizer": ["transformers", "CLIPTokenizer"]}  # fmt: skip


def expert_table(d, layers, latent=8, text=TEXT):
    """Name → shape."""
    shapes = {
        "patch_embed.weight": (d, 4, 2, 2), "patch_embed.bias": (d,), "pos_embed": (1, (latent // 2) ** 2, d), "time_embed.mlp.0.weight": (d, 256),
        "time_embed.mlp.0.bias": (d,), "time_embed.mlp.2.weight": (d, d), "time_embed.mlp.2.bias": (d,), "text_proj.weight": (d, text),
        "text_proj.bias": (d,), "t_block.1.weight": (6 * d, d), "t_block.1.bias": (6 * d,), "final_layer.scale_shift_table": (2, d),
        "final_layer.linear.weight": (16, d), "final_layer.linear.bias": (16,),
    }  # fmt: skip
    for i in range(layers):
        here = f"layers.{i}."
        shapes |= {here + "scale_shift_table": (6, d), here + "mlp.0.weight": (4 * d, d), here + "mlp.0.bias": (4 * d,)}
        shapes |= {here + "mlp.2.weight": (d, 4 * d), here + "mlp.2.bias": (d,)}
        for name in ("attn", "cross_attn"):
            shapes |= {f"{here}{name}.in_proj_weight": (3 * d, d), f"{here}{name}.in_proj_bias": (3 * d,)}
            shapes |= {f"{here}{name}.out_proj.weight": (d, d), f"{here}{name}.out_proj.bias": (d,)}
    return shapes


def router_table(d, layers, clusters, latent=8):
    """Name → shape."""
    shapes = {
        "patch_embed.weight": (d, 4, 2, 2), "patch_embed.bias": (d,), "pos_embed": (1, (latent // 2) ** 2, d), "cls_token": (1, 1, d),
        "time_embed.mlp.0.weight": (d, 256), "time_embed.mlp.0.bias": (d,), "time_embed.mlp.2.weight": (d, d), "time_embed.mlp.2.bias": (d,),
        "head.0.weight": (d, d), "head.0.bias": (d,), "head.2.weight": (d,), "head.2.bias": (d,),
        "head.4.weight": (clusters, d), "head.4.bias": (clusters,),
    }  # fmt: skip
    for i in range(layers):
        here = f"layers.{i}."
        shapes |= {here + "attn.in_proj_weight": (3 * d, d), here + "attn.in_proj_bias": (3 * d,), here + "attn.out_proj.weight": (d, d)}
        shapes |= {here + "attn.out_proj.bias": (d,), here + "mlp.0.weight": (4 * d, d), here + "mlp.0.bias": (4 * d,)}
        shapes |= {here + "mlp.2.weight": (d, 4 * d), here + "mlp.2.bias": (d,)}
        shapes |= {here + "adaLN_modulation.1.weight": (6 * d, d), here + "adaLN_modulation.1.bias": (6 * d,)}
    return shapes


def expert_config(k, shape, text=TEXT):
    return {
        "model_type": "dit_expert", "expert_id": k, "architecture": "dit", **shape, "patch_size": 2, "in_channels": 4, "out_channels": 4,
        "mlp_ratio": 4.0, "use_text_conditioning": True, "use_class_conditioning": False, "num_classes": 1000, "text_embed_dim": text,
        "use_dit_time_embed": True, "use_adaln_single": True, "cfg_dropout_prob": 0.1,
    }  # fmt: skip


def router_config(shape, clusters):
    return {"model_type": "router", "architecture": "dit", "num_clusters": clusters, **shape, "patch_size": 2, "in_channels": 4,
            "use_dit_time_embed": True}  # fmt: skip


def write_random(path: Path, shapes, rng) -> None:
    from safetensors.numpy import save_file

    save_file({name: (rng.standard_normal(shape) * 0.1).astype(np.float32) for name, shape in shapes.items()}, path)


def write_hollow(path: Path, shapes, dtype="F16") -> None:
    """The header of a file of any size, and a hole where the weights would be: a safetensors file of zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * {"F16": 2, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_checkpoint(path: Path, clusters: int = 3) -> None:
    """All of it, at toy size and random weights: diffusers' VAE, transformers' CLIP."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    rng = np.random.default_rng(0)
    for k in range(clusters):
        folder = path / f"expert_{k}"
        folder.mkdir(parents=True)
        write_random(folder / EXPERT_FILE, expert_table(16, 2), rng)
        (folder / "config.json").write_text(json.dumps(expert_config(k, TINY)))
    (path / "router").mkdir()
    write_random(path / "router" / ROUTER_FILE, router_table(16, 2, clusters), rng)
    (path / "router" / "config.json").write_text(json.dumps(router_config(TINY, clusters)))
    top = {"model_name": "Paris", "num_experts": clusters, "dataset_name": "LAION-Aesthetic", "image_size": 8, "num_channels": 4,
           "expert_architecture": "dit", "router_architecture": "dit", "use_latents": True, "vae_name": "stabilityai/sd-vae-ft-mse",
           "text_encoder_name": "openai/clip-vit-large-patch14"}  # fmt: skip
    (path / "config.json").write_text(json.dumps(top))
    (path / "model_index.json").write_text(json.dumps(MODEL_INDEX))
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "block_out_channels": (8, 8)}
    AutoencoderKL(**blocks, norm_num_groups=4).save_pretrained(path / "vae")
    text = CLIPTextConfig(hidden_size=TEXT, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12,
                          vocab_size=49408, bos_token_id=49406, eos_token_id=49407)  # fmt: skip
    CLIPTextModel(text).save_pretrained(path / "text_encoder")
