"""What expert and router have in common: named sizes, released configs, checks of shapes, compiled and recomputed blocks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paris_ray.config import SIZES

RECOMPILE_LIMIT = 64
"""Compilations of a block's code in one process. Each width and precision takes two or three, for one row, the first other number of rows, any other;
experts of an ensemble need not be alike. At torch's own limit, 8, the next one would be an error."""


class Network(nn.Module):
    """A transformer over the patches of a square latent; :class:`paris_ray.models.DiT` or :class:`paris_ray.models.Router`.

    Args:
        image_size: side of the latent.
        patch_size: side of a patch.
        in_channels: channels of the latent.
        hidden_size: width D.
        num_heads: attention heads.
        gradient_checkpointing: recompute the blocks in the backward pass, to save memory.

    Raises:
        ValueError: patches do not cover the latent, or heads do not share the width evenly.
    """

    SETTINGS: ClassVar[dict[str, Any]]
    """What a released config may say beside the constructor's keywords, and the only value that this code computes; ``None``: any, it does not
    touch what the network computes."""

    layers: nn.ModuleList

    def __init__(self, image_size: int, patch_size: int, in_channels: int, hidden_size: int, num_heads: int, gradient_checkpointing: bool):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} must be a multiple of patch_size {patch_size}")
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads}")
        self.image_size, self.patch_size, self.in_channels = image_size, patch_size, in_channels
        self.gradient_checkpointing = gradient_checkpointing

    @classmethod
    def named(cls, size: str, **overrides: Any) -> Self:
        """A network of a named size: ``DiT.named("XL/2")``, ``Router.named("B/2")``; keywords override the constructor's."""
        if size not in SIZES:
            raise ValueError(f"size: {size!r} is not one of {', '.join(SIZES)}")
        return cls(**{**SIZES[size], **overrides})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The network that a ``config.json`` of the released layout describes, with new weights.

        Args:
            config: as :meth:`keywords` takes it.
        """
        return cls(**cls.keywords(config))

    @classmethod
    def keywords(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The constructor's keywords from a ``config.json`` of the released layout; no setting that changes the maths is ignored.

        Args:
            config: settings by name; those that start with an underscore are diffusers' own notes.

        Raises:
            ValueError: a known setting has a value that this code does not compute, or an unknown one is on; the message names it. Or the number of
                heads is missing.
        """
        shape = cls._shape_settings()
        for key, value in config.items():
            if key in shape or key.startswith("_"):
                continue
            if key not in cls.SETTINGS:
                if value is None or value is False:
                    continue  # a feature that is off
                raise ValueError(
                    f"unknown setting {key} = {value!r}, which may change what the network computes; "
                    f"if it does not, allow it by name (ignore_settings=({key!r},))"
                )
            if cls.SETTINGS[key] is not None and value != cls.SETTINGS[key]:
                raise ValueError(f"{key} = {value!r} is not supported; this code computes only {cls.SETTINGS[key]!r}")
        if config.get("num_heads") is None:
            raise ValueError("num_heads is missing, and no tensor's shape tells it; add it to the config as the network was trained")
        return {key: config[key] for key in config if key in shape}

    @classmethod
    def known_settings(cls) -> set[str]:
        """What a ``config.json`` may say."""
        return cls._shape_settings() | cls.SETTINGS.keys()

    @classmethod
    def _shape_settings(cls) -> set[str]:
        plain = next(kind for kind in cls.__mro__ if Network in kind.__bases__)  # not a face, whose keywords are all settings
        return inspect.signature(plain).parameters.keys() - {"gradient_checkpointing"}

    def compile_blocks(self, **options: Any) -> None:
        """Compile the blocks in place, as whole graphs; names of tensors stay. One compilation serves all layers, which are alike.

        Args:
            options: of ``torch.compile``, such as ``mode`` or ``backend``.
        """
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            options = {"recompile_limit": RECOMPILE_LIMIT, **options}
        else:  # an older torch, whose limit is the process's
            from torch._dynamo import config as limits

            limits.recompile_limit = max(limits.recompile_limit, RECOMPILE_LIMIT)
        for layer in self.layers:
            layer.compile(fullgraph=True, **options)

    def _check_latents(self, x: Tensor) -> None:
        wanted = (self.in_channels, self.image_size, self.image_size)
        if x.shape[1:] != wanted:
            raise ValueError(f"x: latents are of shape {tuple(x.shape)}; this network takes (N, {', '.join(map(str, wanted))}), no other size")

    def _block(self, layer: nn.Module, *inputs: Any) -> Tensor:
        """A block's output; with gradient checkpointing, its activations are computed again when gradients are."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return] # blocks draw nothing
        return layer(*inputs)  # type: ignore[no-any-return]
