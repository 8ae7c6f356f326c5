"""The two networks as diffusers models: ``from_pretrained`` and ``save_pretrained`` of an expert's and of the router's folder in the released layout.

Nothing else here imports this module, because importing diffusers takes seconds.

    from paris_ray.models.diffusers_face import ParisDiTModel, ParisRouterModel

    expert = ParisDiTModel.from_pretrained("model/expert_0")
    router = ParisRouterModel.from_pretrained("model", subfolder="router")

Names of tensors, outputs and arguments of ``forward`` are those of :class:`paris_ray.models.DiT` and :class:`paris_ray.models.Router`. Loading is
strict, and safetensors only.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from paris_ray.models.dit import DiT
from paris_ray.models.network import Network
from paris_ray.models.router import Router

ROUTER_WEIGHTS_NAME = "pytorch_model.safetensors"
"""The released router's file, where diffusers expects ``diffusion_pytorch_model.safetensors``."""


class _Strict:
    """Loads all tensors or none, and ignores no setting; goes before the network, whose ``from_config`` would not tell diffusers what it read."""

    _supports_gradient_checkpointing = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As diffusers' :meth:`ModelMixin.from_pretrained`.

        Raises:
            ValueError: a tensor is missing, misshapen or unknown, or so is a setting; the message names it.
            OSError: there are no safetensors.
        """
        with_info = kwargs.pop("output_loading_info", False)
        # We report misshapen tensors; loading by way of accelerate, the default where that is installed, would raise before we can.
        ours = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        kwargs = {"low_cpu_mem_usage": "device_map" in kwargs, **kwargs, **ours}
        model, info = super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        problems = [f"tensor {name} is missing from the file" for name in info["missing_keys"]]
        problems += [f"tensor {name} is in the file but not in the network" for name in info["unexpected_keys"]]
        for name, there, here in info["mismatched_keys"]:
            problems.append(f"tensor {name} has shape {tuple(there)} in the file, {tuple(here)} in the network")
        if problems:
            raise ValueError(f"{pretrained_model_name_or_path} does not fit its config.json: {'; '.join(problems)}")
        return (model, info) if with_info else model

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers', with the strict rule of :meth:`paris_ray.models.network.Network.keywords`."""
        return super(Network, cls).from_config(config, return_unused_kwargs, **kwargs)  # type: ignore[misc]

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As diffusers', which would only warn of a setting it does not know."""
        try:
            cls.keywords(config_dict)  # type: ignore[attr-defined]
        except ValueError as error:
            raise ValueError(f"config.json: {error}") from None
        return super().extract_init_dict(config_dict, **kwargs)  # type: ignore[misc]


class ParisDiTModel(_Strict, DiT, ModelMixin, ConfigMixin):
    """An expert; the keywords are the keys of its released ``config.json``, and what ours add to them (see :class:`DiT`)."""

    _repeated_blocks: ClassVar[list[str]] = ["DiTBlock"]
    _no_split_modules: ClassVar[list[str]] = ["DiTBlock"]

    @register_to_config
    def __init__(
        self,
        model_type: str = "dit_expert",
        expert_id: int | None = None,
        architecture: str = "dit",
        hidden_size: int = 1152,
        num_layers: int = 28,
        num_heads: int = 16,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 4,
        mlp_ratio: float = 4.0,
        use_text_conditioning: bool = True,
        use_class_conditioning: bool = False,
        num_classes: int | None = 1000,
        text_embed_dim: int = 768,
        use_dit_time_embed: bool = True,
        use_adaln_single: bool = True,
        cfg_dropout_prob: float = 0.1,
        image_size: int = 32,
        norm_eps: float = 1e-6,
        objective: str = "flow",
        noise_schedule: str = "cosine",
    ):
        super().__init__(**self.keywords(self.config))


class ParisRouterModel(_Strict, Router, ModelMixin, ConfigMixin):
    """The router; the keywords are the keys of its released ``config.json``, and what ours add to them (see :class:`Router`)."""

    _repeated_blocks: ClassVar[list[str]] = ["RouterBlock"]
    _no_split_modules: ClassVar[list[str]] = ["RouterBlock"]

    @register_to_config
    def __init__(
        self,
        model_type: str = "router",
        architecture: str = "dit",
        num_clusters: int = 8,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        patch_size: int = 2,
        in_channels: int = 4,
        use_dit_time_embed: bool = True,
        image_size: int = 32,
        mlp_ratio: float = 4.0,
        text_embed_dim: int | None = None,
        norm_eps: float = 1e-6,
    ):
        super().__init__(**self.keywords(self.config))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As :meth:`ParisDiTModel.from_pretrained`, from a local folder; its file is called ``pytorch_model.safetensors``."""
        folder = Path(pretrained_model_name_or_path, kwargs.pop("subfolder", None) or "").absolute()
        weights = folder / ROUTER_WEIGHTS_NAME
        if not weights.exists():
            raise OSError(f"{weights} does not exist; give a local folder that holds it and config.json")
        with tempfile.TemporaryDirectory() as under_their_name:
            Path(under_their_name, "config.json").symlink_to(folder / "config.json")
            Path(under_their_name, SAFETENSORS_WEIGHTS_NAME).symlink_to(weights)
            return super().from_pretrained(under_their_name, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As diffusers' :meth:`ModelMixin.save_pretrained`, under the released file's name."""
        super().save_pretrained(save_directory, **{**kwargs, "safe_serialization": True, "max_shard_size": "100GB"})
        Path(save_directory, SAFETENSORS_WEIGHTS_NAME).replace(Path(save_directory, ROUTER_WEIGHTS_NAME))
