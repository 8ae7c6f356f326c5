"""A model as a folder in the released layout, with the ``paris.json`` that says what the layout does not."""

from __future__ import annotations

import os
import shutil
import uuid
from typing import Any

import torch

from paris_ray.data.encoders import NULL_TEXT
from paris_ray.inference.strict import expert_config, load_expert
from paris_ray.inference.weights import ParisModel
from paris_ray.layout import EXPERT_FILE, INFO, ROUTER_FILE, UPLOAD, model_index, released_config, router_config
from paris_ray.manifest import fingerprint
from paris_ray.storage import Folder, copy_file


def save_model(model: ParisModel, path: str | os.PathLike[str], overwrite: bool = False) -> Folder:
    """Write a model so that :func:`paris_ray.inference.weights.load_model` of it gives the same pictures.

    Router, codec, text encoder and null text are those in memory; experts are read from the model's own folder, strictly, one after the other, and
    written in their files' precision, whatever the model runs them in. Tensors and settings that were ignored in loading are left out. Weights are
    safetensors.

    Args:
        model: the model.
        path: a folder or URI. A local one appears as a whole or not at all. In an object store too the old model stays until all files of the new one
            are there; while they take their places no model is found, and if that is cut off, none until it is written again.
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
    if set(names) <= {UPLOAD}:
        return
    if not overwrite:
        raise FileExistsError(f"{target.uri} is not empty; choose another folder, or pass overwrite=True to replace the model there")
    if UPLOAD not in names and ("config.json" not in names or not ("router" in names or INFO in names)):
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
        module, _ = load_expert(source, model.latent_shape[1], model.ignore_tensors, ignore_settings=model.ignore_settings, norm_eps=model.norm_eps)
        _write_network(folder / f"expert_{k}", module, EXPERT_FILE, expert_config(source, model.ignore_settings, model.norm_eps))
    _write_network(folder / "router", model.router, ROUTER_FILE, router_config(model.router))
    info = dict(model.info)
    if not info.get("model_fingerprint"):
        info["model_fingerprint"] = fingerprint({entry.name: folder.sha256(entry.name) for entry in folder.files(recursive=True)})
    folder.write_json(INFO, info)
    # With what the model's own files say besides, such as the data set.
    for name, value in (("model_index.json", model_index(info)), ("config.json", released_config(info))):
        folder.write_json(name, model.folder.read_json(name) if model.folder.exists(name) else value)
    if model.folder.exists("README.md"):
        copy_file(model.folder, "README.md", folder)  # with the licence and attribution of what the model was trained on
    readable = os.stat(os.path.join(folder.path, INFO)).st_mode
    for entry in folder.files(recursive=True):  # safetensors writes for the owner alone
        os.chmod(os.path.join(folder.path, entry.name), readable)


def _write_network(folder: Folder, module: torch.nn.Module, name: str, config: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    os.makedirs(folder.path, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    save_file(tensors, os.path.join(folder.path, name), metadata={"format": "pt"})
    folder.write_json("config.json", config)


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
    """Replace what is in a store.

    Files arrive under another name, where nobody looks for them, so that the old model stays until all are there. While they take their places there
    is neither ``config.json`` nor ``paris.json``, so that nobody finds a model of which one part is old and another new.
    """
    waiting = target / UPLOAD
    waiting.delete_all()
    names = [entry.name for entry in partial.files(recursive=True)]
    for name in names:
        copy_file(partial, name, waiting)
    heads = (INFO, "config.json")
    for name in reversed(heads):  # with paris.json alone the old model is whole
        target.delete(name)
    for entry in target.files(recursive=True):
        if entry.name not in names and not entry.name.startswith(f"{UPLOAD}/"):
            target.delete(entry.name)
    for name in sorted(names, key=lambda name: heads.index(name) if name in heads else -1):
        target.rename(f"{UPLOAD}/{name}", name)
    waiting.delete_all()
