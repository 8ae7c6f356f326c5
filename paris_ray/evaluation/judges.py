"""Encoders that judge: Inception as torch-fidelity has it, for FID and KID, and a CLIP through open_clip, for CLIP score. Imports torch, not Ray.

Any backbone of :func:`paris_ray.data.embedding.build_embedder` is a judge as well. None may be the one that made the clusters: what it cannot tell
apart, experts and router need not tell apart either, and no number of its own would show it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_ray.config import ConfigError, OpenClipEmbedding
from paris_ray.data.embedding import OPEN_CLIP_FILES, ImageEmbedder, image_tower, open_clip_model
from paris_ray.data.encoders import frozen, weights_fingerprint

_ROWS = 64
INCEPTION, INCEPTION_SHA256 = "inception-v3-compat", "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""As torch-fidelity calls it, and the checksum of the weights that it names; their file is a pickle."""


class Inception:
    """Features of Inception-v3 as torch-fidelity makes them, with its resize, on which numbers called FID and KID agree.

    Args:
        weights: a local ``.pth`` of torch-fidelity's weights; ``None``: those that torch-fidelity names, fetched once into torch's cache.
        device: where it runs.
        extractor: another one that is registered with torch-fidelity; a distance in its features is no FID.

    Raises:
        ValueError: torch-fidelity is missing, or the weights are more than tensors, or not those that torch-fidelity names.
    """

    def __init__(self, weights: str | None = None, device: str = "cpu", extractor: str = INCEPTION):
        try:
            from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
            from torch_fidelity.utils import create_feature_extractor
        except ImportError as error:
            raise ValueError(f"FID and KID need a package that is missing ({error}); pip install 'paris_ray[evaluation]'") from None
        tensors = _tensors(weights) if weights is not None or extractor == INCEPTION else None
        self.layer = FEATURE_EXTRACTORS_REGISTRY[extractor].get_default_feature_layer_for_metric("fid")
        self.name = f"torch-fidelity {importlib.metadata.version('torch-fidelity')}, {extractor}, layer {self.layer}"
        self.device = device
        with tempfile.TemporaryDirectory() as folder:  # nobody else's: torch-fidelity unpickles anything that it is given
            options = {"feature_extractor_weights_path": _kept(tensors, folder), "verbose": False}
            self._model = create_feature_extractor(extractor, [self.layer], cuda=False, **options).to(device)
        self.fingerprint = weights_fingerprint(self._model.state_dict())
        side = getattr(self._model, "INPUT_IMAGE_SIZE", None)
        self.resize = "none" if side is None else f"to {side} pixels, bilinear as of TensorFlow 1, by torch-fidelity"

    def __call__(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pictures (N, H, W, 3) → features (N, D)."""
        import torch

        found = []
        with frozen(self.device):
            for start in range(0, len(pictures), _ROWS):
                batch = torch.from_numpy(np.array(pictures[start : start + _ROWS], order="C")).permute(0, 3, 1, 2).to(self.device)
                found.append(self._model(batch)[0].float().cpu().numpy())
        return np.concatenate(found)


def _tensors(weights: str | None) -> dict[str, Any]:
    """The tensors in a file, or in the one that torch-fidelity names; read once, so that nobody changes it after it was looked at."""
    import torch

    where = weights or _fetched()
    try:
        with open(where, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ValueError(f"weights: {where} cannot be read: {error}") from None
    if weights is None and (found := hashlib.sha256(content).hexdigest()) != INCEPTION_SHA256:
        raise ValueError(f"weights: {where} has the SHA-256 {found}, not {INCEPTION_SHA256}; delete it, and it is fetched again")
    try:
        tensors: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"weights: {where} holds more than tensors, or is no file of torch's: {str(error).splitlines()[0]}") from None
    return tensors


def _fetched() -> str:
    """The file that torch-fidelity names, in torch's cache."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(URL_INCEPTION_V3))
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, path, hash_prefix=INCEPTION_SHA256, progress=False)
    return path


def _kept(tensors: dict[str, Any] | None, folder: str) -> str | None:
    import torch

    if tensors is None:
        return None
    torch.save(tensors, path := os.path.join(folder, "weights.pth"))
    return path


class OpenClip:
    """A CLIP that compares pictures with captions.

    Args:
        config: which; as ``data.embedding`` of a run.
        device: where it runs.

    Raises:
        ConfigError: it cannot be found, or does not fit.
    """

    def __init__(self, config: OpenClipEmbedding, device: str = "cpu"):
        model, name = open_clip_model(config)
        self.fingerprint = weights_fingerprint(model.state_dict())
        self.name, self.device = f"open_clip {importlib.metadata.version('open_clip_torch')}, {config.model}", device
        self._tokenizer = _tokenizer(name)
        self._images: ImageEmbedder = image_tower(model.visual, device)
        self._model = model.to(device).requires_grad_(False)
        self.resize = f"to {self._images.image_size} pixels, bicubic with antialiasing"

    def images(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Square pictures (N, H, H, 3) → directions (N, D), of length 1."""
        return _directions(self._images(pictures))

    def texts(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """N captions → directions (N, D), of length 1."""
        found = []
        with frozen(self.device):
            for start in range(0, len(captions), _ROWS):
                tokens = self._tokenizer(list(captions[start : start + _ROWS])).to(self.device)
                found.append(self._model.encode_text(tokens).float().cpu().numpy())
        return _directions(np.concatenate(found))


def _tokenizer(name: str) -> Any:
    """The tokenizer of a CLIP. A folder's own would be transformers', which may run code that lies there: only open_clip's is made for a folder."""
    import open_clip

    if not name.startswith("local-dir:"):
        by_transformers = (open_clip.get_model_config(name) or {}).get("text_cfg", {}).get("hf_tokenizer_name")
        return open_clip.get_tokenizer(name, **({"trust_remote_code": False} if by_transformers else {}))
    where = os.path.join(name.removeprefix("local-dir:"), OPEN_CLIP_FILES[0])
    with open(where, encoding="utf-8") as file:
        text = json.load(file)["model_cfg"].get("text_cfg", {})
    options = text.get("tokenizer_kwargs") or {}
    if text.get("hf_tokenizer_name") or options.keys() - {"clean", "reduction_mask"}:
        raise ConfigError(
            f"model: {where} asks for a tokenizer of its own (hf_tokenizer_name, tokenizer_kwargs), which could run code; choose a CLIP with "
            "open_clip's tokenizer, or name its architecture, and its safetensors as weights"
        )
    return open_clip.SimpleTokenizer(context_length=int(text.get("context_length", 77)), **options)


def _directions(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    from paris_ray.evaluation.metrics import unit

    return unit(vectors)
