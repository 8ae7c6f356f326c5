"""A whole Paris model from its folder: the released layout, with or without our ``paris.json``."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paris_ray.config import SamplingConfig
from paris_ray.data.codec import load_codec
from paris_ray.data.encoders import NULL_TEXT
from paris_ray.data.text import load_text_encoder
from paris_ray.diffusion.path import Objective
from paris_ray.hub import Snapshot, open_model
from paris_ray.inference.precision import check_device, check_precision, set_precision
from paris_ray.inference.strict import PICKLED, load_expert, load_router, read_config, refuse_pickles, stated_objective
from paris_ray.layout import EXPERT_FILE, INFO, UPLOAD
from paris_ray.models import DiT, Router
from paris_ray.storage import Folder

if TYPE_CHECKING:
    from paris_ray.data.codec import Codec
    from paris_ray.data.text import TextEncoder
    from paris_ray.inference.engine import Engine

FORMAT = 1


@dataclass
class ExpertFiles:
    """The experts of a model without the rest of it: what a process needs that runs some of them.

    Attributes:
        folder: where the model's files are.
        latent_shape: (C, H, W).
        text_width: of the text states, D.
        objectives: of each expert, as the model declares them.
        present: which experts have files.
        device: where they run.
        precision: ``fp32``, ``bf16`` or ``int8`` (:mod:`paris_ray.inference.precision`); DDPM experts stay in fp32.
        ignore_tensors: names of tensors that weight files may hold besides.
        ignore_settings: names of unknown settings that the networks' configs may hold besides.
        norm_eps: epsilon of the networks' norms; ``None`` is their configs', or else 1e-6.
        compile: run the networks' blocks compiled (:meth:`paris_ray.models.network.Network.compile_blocks`).
    """

    folder: Folder
    latent_shape: tuple[int, int, int]
    text_width: int
    objectives: tuple[str, ...]
    present: list[bool]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    ignore_tensors: Collection[str] = ()
    ignore_settings: Collection[str] = ()
    norm_eps: float | None = None
    compile: bool = False

    @property
    def num_experts(self) -> int:
        return len(self.objectives)

    def load_expert(self, k: int, on_host: bool = False) -> tuple[DiT, Objective]:
        """See :meth:`ParisModel.load_expert`."""
        if not 0 <= k < self.num_experts:
            raise ValueError(f"expert {k}: there are experts 0…{self.num_experts - 1}")
        channels, size, _ = self.latent_shape
        folder = self.folder / f"expert_{k}"
        module, objective = load_expert(folder, size, self.ignore_tensors, ignore_settings=self.ignore_settings, norm_eps=self.norm_eps)
        _same(f"{folder.uri}/config.json", in_channels=(module.in_channels, channels), out_channels=(module.out_channels, channels),
              text_embed_dim=(module.text_embed_dim, self.text_width))  # fmt: skip
        if self.objectives[k] != objective.name:
            raise ValueError(
                f"{folder.uri}/config.json: objective is {objective.name!r}, {INFO} says {self.objectives[k]!r}; assemble the model again"
            )
        # Changed before it moves, so that the device never holds the file's float32.
        module = set_precision(module, objective, self.precision, self.device)
        return module if on_host else module.to(self.device), objective


class Described:
    """What ``info`` says of a model."""

    info: dict[str, Any]

    @property
    def num_experts(self) -> int:
        return int(self.info["num_experts"])

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        return int(self.info["image_size"])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        latent = self.info["latent"]
        return latent["channels"], latent["size"], latent["size"]

    @property
    def objectives(self) -> tuple[str, ...]:
        """Of each expert, as the model declares them."""
        return tuple(spec["objective"] for spec in self.info["experts"])

    @property
    def defaults(self) -> dict[str, Any]:
        """``steps``, ``guidance_scale``, ``routing`` and ``solver`` of requests that do not say."""
        return dict(self.info["sampling"])

    @property
    def router_reads_text(self) -> bool:
        return bool(self.info["router"]["text"] == "pooled")


@dataclass
class ModelFacts(Described):
    """What a model's configs say, without any of its weights: enough to check requests.

    Attributes:
        folder: where its files are.
        info: ``paris.json``; for a released model without one, the same facts from its configs.
        present: which experts have files.
    """

    folder: Folder
    info: dict[str, Any]
    present: list[bool]


@dataclass
class ParisModel(Described):
    """A model ready to sample from; its experts are loaded one by one, by whoever runs them.

    Attributes:
        folder: where its files are.
        info: ``paris.json``; for a released model without one, the same facts from its configs.
        router: p(cluster | x_t, t[, caption]), float32.
        codec: latents ↔ pictures.
        text_encoder: captions → states.
        null_text: states of the empty caption, (S, D) float32.
        null_length: its tokens.
        present: which experts have files.
        device: where sampling runs.
        precision: of the experts, ``fp32``, ``bf16`` or ``int8`` (:mod:`paris_ray.inference.precision`); DDPM experts stay in fp32.
        ignore_tensors: names of tensors that weight files may hold besides.
        ignore_settings: names of unknown settings that the networks' configs may hold besides.
        norm_eps: epsilon of the networks' norms; ``None`` is their configs', or else 1e-6.
        compile: run the networks' blocks compiled (:meth:`paris_ray.models.network.Network.compile_blocks`).
    """

    folder: Folder
    info: dict[str, Any]
    router: Router
    codec: Codec
    text_encoder: TextEncoder
    null_text: Tensor
    null_length: int
    present: list[bool]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    ignore_tensors: Collection[str] = ()
    ignore_settings: Collection[str] = ()
    norm_eps: float | None = None
    compile: bool = False
    own_engine: tuple[Any, Engine] | None = field(default=None, init=False, repr=False, compare=False)
    """Kept by :func:`paris_ray.inference.engine.generate`."""

    @property
    def router_reads_text(self) -> bool:
        return self.router.text_embed_dim is not None

    def load_expert(self, k: int, on_host: bool = False) -> tuple[DiT, Objective]:
        """Expert ``k`` in the model's precision and what its output means, on the model's device, or yet in CPU memory.

        Raises:
            FileNotFoundError: it has no files (yet).
            ValueError: its files do not fit; see :func:`paris_ray.inference.strict.load_expert`.
        """
        return self.expert_files().load_expert(k, on_host)

    def expert_files(self) -> ExpertFiles:
        """The experts without the rest of the model."""
        return ExpertFiles(self.folder, self.latent_shape, self.null_text.shape[-1], self.objectives, self.present, self.device, self.precision,
                           self.ignore_tensors, self.ignore_settings, self.norm_eps, self.compile)  # fmt: skip


def load_model(
    path: str | os.PathLike[str] | Folder,
    device: str = "cpu",
    precision: str = "fp32",
    ignore_tensors: Collection[str] = (),
    ignore_settings: Collection[str] = (),
    norm_eps: float | None = None,
    compile: bool = False,
) -> ParisModel:
    """Load a model: router, codec, text encoder and null text; experts follow with :meth:`ParisModel.load_expert`.

    Reads nothing outside ``path``. A released model without ``paris.json`` has a VAE, a CLIP text tower, a text-blind router, and experts of flow
    matching where their own configs say nothing else. Experts without files are allowed and reported in ``present``.

    Args:
        path: folder or URI, or a repository of the hub (:func:`paris_ray.hub.open_model`, whose answer is taken as well); from elsewhere,
            files are copied to a local cache first.
        device: torch device of sampling.
        precision: of the experts, ``fp32``, ``bf16`` or ``int8``.
        ignore_tensors: names of tensors that weight files may hold besides.
        ignore_settings: names of unknown settings that the networks' configs may hold besides.
        norm_eps: epsilon of the norms of experts and of the router's blocks; ``None`` is their configs', or else 1e-6. The released configs name
            none, and the only port that reports running the released weights takes 1e-5.
        compile: compile the blocks of experts and router when they first run, which takes a minute and pays on a GPU. A picture then differs within
            rounding from that of blocks that are not compiled, and may differ with the company it is drawn in.

    Raises:
        FileNotFoundError: a file that a model must have is missing.
        ValueError: a setting or a tensor does not fit.
    """
    check_precision(precision)
    target = check_device(device)
    if str(path).endswith(PICKLED):
        refuse_pickles(Folder(os.path.dirname(str(path)) or "."), EXPERT_FILE, [os.path.basename(str(path))])
    folder = open_model(path)
    names = {entry.name for entry in folder.files(recursive=True)}
    info = _info(folder)
    if INFO in names:
        codec, text_encoder = load_codec(folder.uri, info["codec"], device), load_text_encoder(folder.uri, info["text"], device)
    else:
        codec, text_encoder = _released_encoders(folder, device)
        info |= {"codec": codec.meta(), "text": text_encoder.meta()}
    null_text, null_length = _null_text(folder) if NULL_TEXT in names else _encode_nothing(text_encoder)
    router = load_router(folder / "router", info["latent"]["size"], ignore_tensors, device, ignore_settings, norm_eps).float()

    where = f"{folder.uri}/router/config.json"
    _same(where, num_clusters=(router.num_clusters, info["num_experts"]))
    if info["router"]["text"] == "pooled":
        _same(where, text_embed_dim=(router.text_embed_dim, text_encoder.width))
    else:
        _same(where, text_embed_dim=(router.text_embed_dim, None))
    _same(f"{folder.uri}/{NULL_TEXT}", width=(null_text.shape[-1], text_encoder.width))
    present = [f"expert_{k}/config.json" in names for k in range(info["num_experts"])]
    for k in (k for k, here in enumerate(present) if not here and any(name.startswith(f"expert_{k}/") for name in names)):
        raise FileNotFoundError(f"{folder.uri}/expert_{k} has files but no config.json; add it, or remove the folder")
    complete = not isinstance(folder, Snapshot)  # of a repository, the experts' weights come later
    for k in (k for k, here in enumerate(present) if complete and here and f"expert_{k}/{EXPERT_FILE}" not in names):
        refuse_pickles(folder / f"expert_{k}", EXPERT_FILE)
        raise FileNotFoundError(f"{folder.uri}/expert_{k} has a config.json but no {EXPERT_FILE}; add it, or remove the folder")
    return ParisModel(folder, info, router, codec, text_encoder, null_text.to(target), null_length, present, target, precision,
                      ignore_tensors, ignore_settings, norm_eps, compile)  # fmt: skip


def open_experts(
    path: str | os.PathLike[str],
    device: str = "cpu",
    precision: str = "fp32",
    ignore_tensors: Collection[str] = (),
    ignore_settings: Collection[str] = (),
    norm_eps: float | None = None,
    compile: bool = False,
) -> ExpertFiles:
    """The experts of a model, without loading router, codec or text encoder; arguments and errors as of :func:`load_model`."""
    facts, target = read_facts(path), check_device(device)
    return ExpertFiles(facts.folder, facts.latent_shape, facts.info["text"]["width"], facts.objectives, facts.present, target, precision,
                       ignore_tensors, ignore_settings, norm_eps, compile)  # fmt: skip


def read_facts(path: str | os.PathLike[str] | Folder) -> ModelFacts:
    """What a model's configs say; reads no weights, and fetches none of a repository. Errors as of :func:`load_model`."""
    folder = open_model(path, configs_only=True)
    info = _info(folder)
    return ModelFacts(folder, info, [folder.exists(f"expert_{k}/config.json") for k in range(info["num_experts"])])


def _info(folder: Folder) -> dict[str, Any]:
    if folder.exists(INFO):
        return read_info(folder)
    if not folder.files(recursive=True):
        raise FileNotFoundError(f"{folder.uri} holds no model; give the folder that jobs.assemble made, or a released Paris checkpoint")
    if folder.exists(f"model/{INFO}"):
        raise FileNotFoundError(f"{folder.uri} is the folder of a run; give its model, {folder.uri}/model")
    return _released_info(folder, _released_config(folder))


def read_info(folder: Folder) -> dict[str, Any]:
    """``paris.json`` of a model. Raises FileNotFoundError, ValueError."""
    info: dict[str, Any] = folder.read_json(INFO)
    where = f"{folder.uri}/{INFO}"
    if info.get("format") != FORMAT:
        raise ValueError(f"{where}: format is {info.get('format')!r}, this version reads {FORMAT}; assemble the model again")
    needed = ("name", "num_experts", "image_size", "latent", "codec", "text", "router", "sampling", "experts")
    if missing := [key for key in needed if key not in info]:
        raise ValueError(f"{where}: {', '.join(missing)} missing; assemble the model again")
    if len(info["experts"]) != info["num_experts"]:
        raise ValueError(f"{where}: experts lists {len(info['experts'])}, num_experts is {info['num_experts']}; assemble the model again")
    return info


def _released_config(folder: Folder) -> dict[str, Any]:
    """``config.json`` of a model without ``paris.json``."""
    if not folder.exists("config.json"):
        if folder.exists(UPLOAD):
            raise FileNotFoundError(f"{folder.uri}: a model is being written here, or its writing was cut off; write it again (overwrite=True)")
        raise FileNotFoundError(f"{folder.uri} has neither {INFO} nor config.json: it is not a whole model; copy what is missing")
    config = read_config(folder)
    for key, value in {"expert_architecture": "dit", "router_architecture": "dit", "use_latents": True}.items():
        if config.get(key, value) != value:
            raise ValueError(f"{folder.uri}/config.json: {key} = {config[key]!r} is not supported; only {value!r} is")
    if missing := [key for key in ("num_experts", "image_size", "num_channels") if key not in config]:
        raise ValueError(f"{folder.uri}/config.json: {', '.join(missing)} missing; it is not the config of a released Paris checkpoint")
    return config


def _released_experts(folder: Folder, count: int) -> list[dict[str, Any]]:
    """What ``paris.json`` would say of a released model's experts, by their own configs."""
    unknown = dict.fromkeys(("cluster_size", "fingerprint", "manifest", "images"))
    experts = []
    for k in range(count):
        there = folder.exists(f"expert_{k}/config.json")
        kind, schedule = stated_objective(read_config(folder / f"expert_{k}") if there else {})
        experts.append({"index": k, "objective": kind, "noise_schedule": schedule, **unknown})
    return experts


def _released_encoders(folder: Folder, device: str) -> tuple[Codec, TextEncoder]:
    length = (folder / "text_encoder").read_json("config.json").get("max_position_embeddings", 77)
    codec = load_codec(folder.uri, {"kind": "vae", "scaling_factor": None, "fingerprint": None}, device)
    return codec, load_text_encoder(folder.uri, {"kind": "clip", "max_length": length, "fingerprint": None}, device)


def _released_info(folder: Folder, config: dict[str, Any]) -> dict[str, Any]:
    """What ``paris.json`` would say of a released checkpoint (arXiv 2510.03434 and its model card), from its configs alone."""
    if absent := [name for name in ("vae", "text_encoder") if not folder.exists(name)]:
        raise FileNotFoundError(f"{folder.uri} has neither {INFO} nor {', '.join(absent)}: it is not a whole model; copy what is missing")
    vae, text = read_config(folder / "vae"), read_config(folder / "text_encoder")
    text = text.get("text_config", text)
    for name, found, needed in (("vae", vae, ("latent_channels", "block_out_channels")), ("text_encoder", text, ("hidden_size",))):
        if missing := [key for key in needed if key not in found]:
            raise ValueError(f"{folder.uri}/{name}/config.json: {', '.join(missing)} missing; take the folder from the released checkpoint")
    count, size = config["num_experts"], config["image_size"]
    _same(f"{folder.uri}/vae/config.json", latent_channels=(vae["latent_channels"], config["num_channels"]))
    return {
        "format": FORMAT,
        "name": config.get("model_name", "Paris"),
        "num_experts": count,
        "image_size": size * 2 ** (len(vae["block_out_channels"]) - 1),
        "latent": {"channels": config["num_channels"], "size": size},
        "codec": {"kind": "vae"},
        "text": {"kind": "clip", "width": text["hidden_size"]},
        "router": {"text": "none"},
        "sampling": SamplingConfig().model_dump(mode="json"),
        "experts": _released_experts(folder, count),
        "attribution": None,
        "model_fingerprint": None,
    }


def _null_text(folder: Folder) -> tuple[Tensor, int]:
    from safetensors.torch import load_file

    tensors = load_file(folder.local_copy(NULL_TEXT))
    if missing := {"states", "length"} - tensors.keys():
        raise ValueError(f"{folder.uri}/{NULL_TEXT}: tensor {', '.join(sorted(missing))} is missing; assemble the model again")
    return tensors["states"].float(), int(tensors["length"][0])


def _encode_nothing(encoder: TextEncoder) -> tuple[Tensor, int]:
    ids, lengths = encoder.tokenize([""])
    with torch.inference_mode():
        return encoder.encode(torch.as_tensor(ids), torch.as_tensor(lengths))[0].float(), int(lengths[0])


def _same(where: str, **pairs: tuple[Any, Any]) -> None:
    for key, (found, wanted) in pairs.items():
        if found != wanted:
            raise ValueError(f"{where}: {key} is {found}, the rest of the model has {wanted}; take all parts from one model")
