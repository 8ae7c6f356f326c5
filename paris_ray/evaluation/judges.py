"""Encoders that judge: Inception as torch-fidelity has it, for FID and KID, and a CLIP through open_clip, for CLIP score. Imports torch, not Ray.

Any backbone of :func:`paris_ray.data.embedding.build_embedder` is a judge as well. None may be the one that made the clusters: what it cannot tell
apart, experts and router need not tell apart either, and no number of its own would show it.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from paris_ray.config import OpenClipEmbedding
from paris_ray.data.embedding import ImageEmbedder, image_tower, open_clip_model
from paris_ray.data.encoders import frozen, weights_fingerprint

_ROWS = 64


class Inception:
    """Features of Inception-v3 as torch-fidelity makes them, with its resize, on which numbers called FID and KID agree.

    Args:
        weights: a local ``.pth`` of torch-fidelity's weights; ``None``: as torch-fidelity fetches them, once, into torch's cache.
        device: where it runs.
        extractor: another one that is registered with torch-fidelity; a distance in its features is no FID.

    Raises:
        ValueError: torch-fidelity is missing, or the weights are more than tensors.
    """

    def __init__(self, weights: str | None = None, device: str = "cpu", extractor: str = "inception-v3-compat"):
        import torch

        try:
            from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
            from torch_fidelity.utils import create_feature_extractor
        except ImportError as error:
            raise ValueError(f"FID and KID need a package that is missing ({error}); pip install 'paris_ray[evaluation]'") from None
        if weights is not None:
            try:
                torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would unpickle anything
            except Exception as error:
                raise ValueError(f"weights: {weights} holds more than tensors, or is no file of torch's: {str(error).splitlines()[0]}") from None
        self.layer = FEATURE_EXTRACTORS_REGISTRY[extractor].get_default_feature_layer_for_metric("fid")
        self.name = f"torch-fidelity {importlib.metadata.version('torch-fidelity')}, {extractor}, layer {self.layer}"
        options = {"feature_extractor_weights_path": weights, "verbose": False}
        self.device = device
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


class OpenClip:
    """A CLIP that compares pictures with captions.

    Args:
        config: which; as ``data.embedding`` of a run.
        device: where it runs.

    Raises:
        ConfigError: it cannot be found, or does not fit.
    """

    def __init__(self, config: OpenClipEmbedding, device: str = "cpu"):
        import open_clip

        model, name = open_clip_model(config)
        self.fingerprint = weights_fingerprint(model.state_dict())
        self.name, self.device = f"open_clip {importlib.metadata.version('open_clip_torch')}, {config.model}", device
        self._tokenizer = open_clip.get_tokenizer(name)
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


def _directions(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    from paris_ray.evaluation.metrics import unit

    return unit(vectors)
