"""A model as a folder in the released layout, with the ``paris.json`` that says what the layout does not."""

from __future__ import annotations

import os
import shutil
import uuid
from typing import Any

import torch

from paris_ray.inference.strict import EXPERT_FILE, ROUTER_FILE, load_expert, read_config
from paris_ray.inference.weights import INFO, NULL_TEXT, ParisModel
from paris_ray.manifest import fingerprint
from paris_ray.models import Router
from paris_ray.storage import Folder, copy_file


def save_model(model: ParisModel, path: str | os.PathLike[str], overwrite: bool = False) -> Folder:
    """Write a model so that :func:`paris_ray.inference.weights.load_model` of it gives the same pictures.

    Router, codec, text encoder and null text are those in memory; experts are read from the model's own folder, strictly, one after the other, and
    written in their files' precision, whatever the model runs them in. Tensors that were ignored in loading are left out. Weights are safetensors.

    Args:
        model: the model.
        path: a folder or URI. A local one appears as a whole or not at all; in an object store ``config.json`` comes last.
        overwrite: replace a model that is there; other files are never replaced.

    Returns:
        the folder.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: an expert's file does not fit its config.
    """
    target = Folder(path)
    _check_target(target, overwrite)
    if target.is_local:
        partial = Folder(f"{target.path}.tmp-{uuid.uuid4().hex}")
    else:
        import tempfile

        partial = Folder(tempfile.mkdtemp())
    try:
        _write(model, partial)
        if target.is_local:
            _swap(partial.path, target.path)
        else:
            _upload(partial, target)
    finally:
        shutil.rmtree(partial.path, ignore_errors=True)
    return target


def _check_target(target: Folder, overwrite: bool) -> None:
    names = [entry.name for entry in target.files()] + target.folders()
    if not names:
        return
    if not overwrite:
        raise FileExistsError(f"{target.uri} is not empty; choose another folder, or pass overwrite=True to replace the model there")
    if "config.json" not in names or not ("router" in names or INFO in names):
        raise FileExistsError(f"{target.uri} holds something else than a model, which is not replaced; choose another folder")


def _write(model: ParisModel, folder: Folder) -> None:
    from safetensors.torch import save_file

    os.makedirs(folder.path, exist_ok=True)
    model.codec.save(folder.path)
    model.text_encoder.save(folder.path)
    null = {"states": model.null_text.cpu().contiguous(), "length": torch.tensor([model.null_length], dtype=torch.int32)}
    ids, _ = model.text_encoder.tokenize([""])
    save_file({**null, "token_ids": torch.as_tensor(ids[0])}, os.path.join(folder.path, NULL_TEXT))
    for k in (k for k, here in enumerate(model.present) if here):
        source = model.folder / f"expert_{k}"
        module, _ = load_expert(source, model.latent_shape[1], model.ignore_tensors)
        _write_network(folder / f"expert_{k}", module, EXPERT_FILE, read_config(source))
    _write_network(folder / "router", model.router, ROUTER_FILE, router_config(model.router))
    info = dict(model.info)
    if not info.get("model_fingerprint"):
        info["model_fingerprint"] = fingerprint({entry.name: folder.sha256(entry.name) for entry in folder.files(recursive=True)})
    folder.write_json(INFO, info)
    released = _released_config(model)
    folder.write_json("model_index.json", {"_class_name": "DDMPipeline", "num_experts": model.num_experts})
    folder.write_json("config.json", released)
    if model.folder.exists("README.md"):
        copy_file(model.folder, "README.md", folder)  # with the licence and attribution of what the model was trained on


def _write_network(folder: Folder, module: torch.nn.Module, name: str, config: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    os.makedirs(folder.path, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    save_file(tensors, os.path.join(folder.path, name), metadata={"format": "pt"})
    folder.write_json("config.json", config)


def router_config(router: Router) -> dict[str, Any]:
    """``config.json`` of a router in memory, with the released keys and what they leave open."""
    weight, layer = router.patch_embed.weight, router.layers[0]
    width, patch = weight.shape[0], weight.shape[-1]
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
        "mlp_ratio": layer.mlp[0].weight.shape[0] / width,  # type: ignore[index,union-attr]
        "text_embed_dim": router.text_embed_dim,
    }


def _released_config(model: ParisModel) -> dict[str, Any]:
    """The model's own ``config.json``, or one that says the same of a model that has none."""
    if model.folder.exists("config.json"):
        return read_config(model.folder)
    channels, size, _ = model.latent_shape
    return {
        "model_name": model.info["name"],
        "num_experts": model.num_experts,
        "image_size": size,
        "num_channels": channels,
        "expert_architecture": "dit",
        "router_architecture": "dit",
        "use_latents": True,
        "vae_name": model.codec.kind,
        "text_encoder_name": model.text_encoder.kind,
    }


def _swap(partial: str, target: str) -> None:
    """Put a finished folder in its place; an old one is gone only when the new one is there."""
    old = f"{target}.tmp-{uuid.uuid4().hex}"
    if os.path.isdir(target):
        os.rename(target, old)
    try:
        os.rename(partial, target)
    except OSError:
        if os.path.isdir(old):
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _upload(partial: Folder, target: Folder) -> None:
    target.delete_all()
    names = [entry.name for entry in partial.files(recursive=True)]
    for name in sorted(names, key=lambda name: name == "config.json"):  # the top one last: without it there is no model
        copy_file(partial, name, target)
