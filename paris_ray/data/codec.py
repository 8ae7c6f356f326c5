"""Latent codecs: picture ↔ latent of unit scale. A diffusers VAE, or PCA of patches fitted on the training split."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from paris_ray.config import ConfigError
from paris_ray.config import PatchPcaCodec as PatchPcaConfig
from paris_ray.config import VaeCodec as VaeConfig
from paris_ray.data.encoders import frozen, in_chunks, weights_fingerprint
from paris_ray.headers import Header, Shape, check_header, check_layers, does_not_fit, read_header
from paris_ray.layout import VAE_FILE
from paris_ray.storage import Folder

if TYPE_CHECKING:
    from torch import Tensor

Images = NDArray[np.uint8]

GPU_ROWS = 16
"""Pictures of one forward pass of a VAE on a GPU, at most; on a CPU it is one."""


class Codec(Protocol):
    """Frozen map between pictures and latents. ``decode`` gives a picture the same bytes alone and in a batch, on CPU."""

    kind: str
    channels: int
    downsampling: int
    fingerprint: str

    def encode(self, images: Images | Tensor) -> Tensor:
        """(N, H, W, 3) uint8 → scaled latents (N, C, h, w) float32."""
        ...

    def decode(self, latents: Tensor) -> Images:
        """Scaled latents (N, C, h, w) → (N, H, W, 3) uint8."""
        ...

    def to(self, device: str) -> None:
        """Move it to a device."""
        ...

    def save(self, folder: str) -> None:
        """Write what :func:`load_codec` needs below a local folder."""
        ...

    def meta(self) -> dict[str, Any]:
        """What ``encoders.json`` and ``paris.json`` say about it."""
        ...


# -- PCA of patches -----------------------------------------------------------------------------------------------------


def patches(images: Images, d: int) -> NDArray[np.uint8]:
    """Square patches as rows, row-major: (N, H, W, 3) → (N, H/d · W/d, d · d · 3)."""
    n, height, width, _ = images.shape
    grid = images.reshape(n, height // d, d, width // d, d, 3).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(n, (height // d) * (width // d), d * d * 3)


@dataclass
class PatchSums:
    """Sums over patches of 8-bit samples. They are integers below 2⁵³, so float64 holds them exactly and their order does not matter."""

    count: int
    total: NDArray[np.float64]  # (P,)
    outer: NDArray[np.float64]  # (P, P)

    @classmethod
    def zero(cls, d: int) -> PatchSums:
        """Of no patch, of side ``d``."""
        return cls(0, np.zeros(3 * d * d), np.zeros((3 * d * d, 3 * d * d)))

    def add(self, images: Images, d: int) -> None:
        """Add the patches of pictures (N, H, W, 3)."""
        rows = patches(images, d).reshape(-1, 3 * d * d).astype(np.float64)
        self.merge(PatchSums(len(rows), rows.sum(0), rows.T @ rows))

    def merge(self, other: PatchSums) -> None:
        """Add another's sums."""
        self.count += other.count
        self.total += other.total
        self.outer += other.outer


class PatchPcaCodec:
    """Projection of square patches on their first principal components.

    A component's latent is divided by the square root of its standard deviation, and all of them by one number that gives the whole latent unit
    variance: halfway between keeping the spectrum (where noise covers all but the first components at once) and whitening it (where the loss
    is spent on details).

    Args:
        downsampling: side of a patch in pixels.
        mean: (P,) mean patch, samples in [0, 1], P = 3 · downsampling².
        components: (P, C) orthonormal columns.
        scale: (C,) what each projection is divided by.
        kept: share of the variance that the components keep.
    """

    kind = "patch_pca"

    def __init__(self, downsampling: int, mean: NDArray[Any], components: NDArray[Any], scale: NDArray[Any], kept: float):
        self.downsampling, self.channels, self.kept = downsampling, components.shape[1], kept
        self.weights = {name: np.ascontiguousarray(x, np.float32) for name, x in (("mean", mean), ("components", components), ("scale", scale))}
        self.fingerprint = weights_fingerprint(self.weights)
        self._forward = self.weights["components"] / self.weights["scale"]
        self._back = np.ascontiguousarray((self.weights["components"] * self.weights["scale"]).T)

    @classmethod
    def fit(cls, config: PatchPcaConfig, sums: PatchSums) -> PatchPcaCodec:
        """PCA from sums over the training split. Raises ConfigError when it has too few distinct patches."""
        if sums.count < 2:
            raise ConfigError("data.codec: the training split has no picture to fit the codec on; give more images or smaller held-out shares")
        mean = sums.total / sums.count
        covariance = (sums.outer / sums.count - np.outer(mean, mean)) / 255**2
        values, vectors = np.linalg.eigh(covariance)
        values, vectors = values[::-1], vectors[:, ::-1]
        c = config.channels
        if c > len(values) or values[c - 1] <= 1e-9:
            rank = int((values > 1e-9).sum())
            raise ConfigError(
                f"data.codec.channels is {c}, but patches of {config.downsampling} × {config.downsampling} pixels have only {rank} directions here; "
                f"set it to at most {rank}"
            )
        components, deviation = vectors[:, :c], np.sqrt(values[:c])
        # An eigenvector's sign is arbitrary: make its largest entry positive.
        components = components * np.sign(components[np.abs(components).argmax(0), np.arange(c)])
        # The variance of channel i, divided by the root of its deviation, is deviation_i.
        scale = np.sqrt(deviation) * np.sqrt(deviation.mean())
        return cls(config.downsampling, mean / 255, components, scale, float(values[:c].sum() / values.sum()))

    def encode(self, images: Images | Tensor) -> Tensor:
        """(N, H, W, 3) uint8 → scaled latents (N, C, h, w) float32."""
        import torch

        pixels = np.asarray(images)
        n, height, width, _ = pixels.shape
        h, w = height // self.downsampling, width // self.downsampling
        out = np.empty((n, self.channels, h, w), np.float32)
        # Picture by picture: a product of constant shape gives the same bytes in any batch.
        for i in range(n):
            rows = patches(pixels[i : i + 1], self.downsampling)[0] / np.float32(255) - self.weights["mean"]  # (h·w, P)
            out[i] = (rows @ self._forward).reshape(h, w, self.channels).transpose(2, 0, 1)
        return torch.from_numpy(out)

    def decode(self, latents: Tensor) -> Images:
        """Scaled latents (N, C, h, w) → (N, H, W, 3) uint8."""
        z = latents.detach().float().cpu().numpy()
        n, _, h, w = z.shape
        d = self.downsampling
        out = np.empty((n, h * d, w * d, 3), np.uint8)
        for i in range(n):
            rows = z[i].reshape(self.channels, h * w).T @ self._back + self.weights["mean"]  # (h·w, P)
            samples = np.rint(rows * 255).clip(0, 255).astype(np.uint8)
            out[i] = samples.reshape(h, w, d, d, 3).transpose(0, 2, 1, 3, 4).reshape(h * d, w * d, 3)
        return out

    def to(self, device: str) -> None:
        """Stay on the CPU."""

    def save(self, folder: str) -> None:
        """Write ``codec/codec.safetensors`` and ``codec/config.json``."""
        from safetensors.numpy import save_file

        os.makedirs(os.path.join(folder, "codec"), exist_ok=True)
        save_file(self.weights, os.path.join(folder, "codec", "codec.safetensors"))
        with open(os.path.join(folder, "codec", "config.json"), "w") as file:
            json.dump({**self.meta(), "kept_variance": self.kept}, file, indent=1, sort_keys=True)

    @classmethod
    def load(cls, folder: str) -> PatchPcaCodec:
        """Read what :meth:`save` wrote; local path or URI."""
        from safetensors.numpy import load_file

        local = (Folder(folder) / "codec").local()
        with open(os.path.join(local, "config.json")) as file:
            config = json.load(file)
        weights = load_file(os.path.join(local, "codec.safetensors"))
        return cls(config["downsampling"], weights["mean"], weights["components"], weights["scale"], config["kept_variance"])

    def meta(self) -> dict[str, Any]:
        """What ``encoders.json`` says about it."""
        return {"kind": self.kind, "channels": self.channels, "downsampling": self.downsampling, "fingerprint": self.fingerprint}


# -- VAE ----------------------------------------------------------------------------------------------------------------


class VaeCodec:
    """A diffusers ``AutoencoderKL``. Latents are the posterior's mean (less its shift, if the VAE has one) times the scaling factor.

    Args:
        model: the VAE.
        scaling_factor: ``None`` takes the VAE's own.
        device: where it runs.
    """

    kind = "vae"

    def __init__(self, model: Any, scaling_factor: float | None = None, device: str = "cpu"):
        self.model = model.eval().requires_grad_(False)
        config = model.config
        self.channels, self.downsampling = int(config.latent_channels), 2 ** (len(config.block_out_channels) - 1)
        self.scaling_factor = float(config.scaling_factor if scaling_factor is None else scaling_factor)
        self.shift = float(getattr(config, "shift_factor", None) or 0.0)
        self.fingerprint = weights_fingerprint(model.state_dict())
        self.to(device)

    def to(self, device: str) -> None:
        """Move it to a device."""
        self.model.to(device)
        self.device = device

    def encode(self, images: Images | Tensor) -> Tensor:
        """(N, H, W, 3) uint8 → scaled latents (N, C, h, w) float32."""
        import torch

        def one(batch: Tensor) -> Tensor:
            pixels = batch.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            return (self.model.encode(pixels).latent_dist.mode() - self.shift) * self.scaling_factor

        with frozen(self.device):
            return in_chunks(one, torch.as_tensor(images), self.device, GPU_ROWS, on_cpu=1)

    def decode(self, latents: Tensor) -> Images:
        """Scaled latents (N, C, h, w) → (N, H, W, 3) uint8."""
        import torch

        def one(batch: Tensor) -> Tensor:
            pixels = self.model.decode(batch / self.scaling_factor + self.shift).sample
            return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

        with frozen(self.device):
            return np.asarray(in_chunks(one, latents.to(self.device, torch.float32), self.device, GPU_ROWS, on_cpu=1).cpu().numpy())

    def save(self, folder: str) -> None:
        """Write ``vae/`` in diffusers' layout."""
        self.model.save_pretrained(os.path.join(folder, "vae"), safe_serialization=True)

    def meta(self) -> dict[str, Any]:
        """What ``encoders.json`` says about it."""
        return {
            "kind": self.kind,
            "channels": self.channels,
            "downsampling": self.downsampling,
            "scaling_factor": self.scaling_factor,
            "fingerprint": self.fingerprint,
        }


_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Parts of the attention in files of before diffusers 0.12, as that of sd-vae-ft-mse; diffusers still reads them."""


def read_vae(folder: str, where: str | None = None) -> dict[str, Shape]:
    """The tensors that a VAE's ``config.json`` implies, after comparing them with the header of its file; no weights are read.

    Args:
        folder: local.
        where: what messages call it, if not by its path.

    Raises:
        ValueError: a tensor is missing, misshapen or too many; names it.
    """
    import torch
    from diffusers import AutoencoderKL

    where = f"{where or folder}/{VAE_FILE}"
    header: Header = {}
    for name, entry in read_header(os.path.join(folder, VAE_FILE), where).items():
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)  # noqa: PLW2901
        header[name] = entry
    config = AutoencoderKL.load_config(folder)
    try:
        check_layers(where, header, len(config.get("block_out_channels", ())) * int(config.get("layers_per_block", 1)))
        with torch.device("meta"):
            model = AutoencoderKL.from_config(config)
    except (TypeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{os.path.dirname(where)}/config.json: {' '.join(str(error).split())[:300]}") from None
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_header(where, header, wanted)
    return wanted


def _load_vae(path: str, scaling_factor: float | None, device: str, where: str | None = None) -> VaeCodec:
    """From a local folder or a repository of the hub, whole or not at all."""
    from diffusers import AutoencoderKL

    where = where or path
    if os.path.isfile(os.path.join(path, VAE_FILE)) and os.path.isfile(os.path.join(path, "config.json")):
        read_vae(path, where)  # before memory is taken for what a config says
    elif os.path.isdir(path):
        raise ValueError(f"{where} holds no AutoencoderKL with safetensors weights: it needs config.json and {VAE_FILE}")
    # diffusers fills in random values for what does not fit, and goes on; by way of accelerate it would raise before it says what that is.
    options = {"use_safetensors": True, "low_cpu_mem_usage": False, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        model, info = AutoencoderKL.from_pretrained(path, **options)
    except OSError as error:
        raise ValueError(
            f"{where} holds no AutoencoderKL with safetensors weights that this machine can reach: {str(error).splitlines()[0]}"
        ) from None
    problems = [f"tensor {name} is missing from the file" for name in sorted(info["missing_keys"])]
    problems += [f"tensor {name} is in the file but not in the network" for name in sorted(info["unexpected_keys"])]
    for name, there, here in info["mismatched_keys"]:
        problems.append(f"tensor {name} has shape {tuple(there)} in the file, {tuple(here)} in the network")
    if problems:
        raise ValueError(does_not_fit(where, problems))
    return VaeCodec(model, scaling_factor, device)


def build_vae(config: VaeConfig, device: str = "cpu") -> VaeCodec:
    """The VAE that a config names: a local folder (or its ``vae/``), or a repository of the hub. Raises ConfigError."""
    source = config.source
    if os.path.isdir(os.path.join(source, "vae")):
        source = os.path.join(source, "vae")
    try:
        return _load_vae(source, config.scaling_factor, device)
    except ValueError as error:
        raise ConfigError(f"data.codec.source: {error}") from None


def load_codec(folder: str, meta: dict[str, Any], device: str = "cpu") -> Codec:
    """The codec of a run or a model.

    Args:
        folder: ``RUN/encoders`` or a model folder; path or URI.
        meta: its entry ``codec`` in ``encoders.json`` or ``paris.json``; a fingerprint of ``None`` takes whatever weights are there.
        device: where it runs; PCA always runs on the CPU.

    Raises:
        ValueError: the weights do not fit their config or are not those that ``meta`` names, or the kind is unknown.
    """
    if meta["kind"] == "patch_pca":
        codec: Codec = PatchPcaCodec.load(folder)
    elif meta["kind"] == "vae":
        codec = _load_vae((Folder(folder) / "vae").local(), meta["scaling_factor"], device, f"{folder}/vae")
    else:
        raise ValueError(f"codec.kind is {meta['kind']!r}; known are patch_pca and vae")
    if meta["fingerprint"] not in (None, codec.fingerprint):
        raise ValueError(
            f"the codec in {folder} has the fingerprint {codec.fingerprint}, its description says {meta['fingerprint']}; restore the file"
        )
    return codec
