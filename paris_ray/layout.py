"""The released layout: what its files are called, and what the small ones say. Imports nothing heavy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paris_ray.models import Router

EXPERT_FILE = "diffusion_pytorch_model.safetensors"
ROUTER_FILE = "pytorch_model.safetensors"
VAE_FILE = "diffusion_pytorch_model.safetensors"
TEXT_FILE = "model.safetensors"

EARLIER_ROUTERS = "routers"
"""Below the run's directory: the routers before experts were added, by how many they know."""

INFO = "paris.json"
"""What the released layout does not say; written beside it by us."""

UPLOAD = "_paris_ray_upload"
"""Where the files of a model wait in an object store until all of them are there."""


def released_config(info: dict[str, Any], **known: Any) -> dict[str, Any]:
    """``config.json`` of a model.

    Args:
        info: its ``paris.json``.
        known: what that does not say, such as ``dataset_name`` and ``vae_name``.
    """
    return {
        "model_name": info["name"],
        "num_experts": info["num_experts"],
        "image_size": info["latent"]["size"],
        "num_channels": info["latent"]["channels"],
        "expert_architecture": "dit",
        "router_architecture": "dit",
        "use_latents": True,
        "vae_name": info["codec"]["kind"],
        "text_encoder_name": info["text"]["kind"],
        **known,
    }


def model_index(info: dict[str, Any]) -> dict[str, Any]:
    """``model_index.json``, as the released one: its pipeline's class is not in diffusers, and is not needed to load a model here."""
    index: dict[str, Any] = {"_class_name": "DDMPipeline", "num_experts": info["num_experts"]}
    if info["codec"]["kind"] == "vae":
        index["vae"] = ["diffusers", "AutoencoderKL"]
    if info["text"]["kind"] == "clip":
        index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    return index


def router_config(router: Router) -> dict[str, Any]:
    """``config.json`` of a router, with the released keys and what they leave open."""
    weight, layer = router.patch_embed.weight, router.layers[0]
    width, patch = weight.shape[0], weight.shape[-1]
    inner = layer.mlp[0].weight.shape[0]  # type: ignore[index,union-attr]
    ratio = inner / width
    if int(ratio * width) < inner:
        ratio = math.nextafter(ratio, math.inf)  # the network rounds down
    return {
        "model_type": "router",
        "architecture": "dit",
        "num_clusters": router.num_clusters,
        "hidden_size": width,
        "num_layers": len(router.layers),
        "num_heads": layer.attn.num_heads,  # type: ignore[union-attr]
        "patch_size": patch,
        "in_channels": weight.shape[1],
        "use_dit_time_embed": True,
        "image_size": round(router.pos_embed.shape[1] ** 0.5) * patch,
        "norm_eps": layer.norm1.eps,  # type: ignore[union-attr]
        "mlp_ratio": ratio,
        "text_embed_dim": router.text_embed_dim,
    }
