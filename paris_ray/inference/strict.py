"""Networks from safetensors files, strictly.

Every tensor is there with its shape and none besides; nothing is unpickled; no setting that changes the maths is ignored.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from paris_ray.diffusion.path import Objective, objective
from paris_ray.headers import Header, check_header, does_not_fit, read_header
from paris_ray.layout import EXPERT_FILE, ROUTER_FILE
from paris_ray.models import DiT, Router
from paris_ray.storage import Folder

MOST_LAYERS = 1024
"""A network of more is refused: making one takes time, however small its layers are."""
PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


def load_expert(
    folder: Folder,
    latent_size: int,
    ignore: Collection[str] = (),
    device: str = "cpu",
    ignore_settings: Collection[str] = (),
    norm_eps: float | None = None,
) -> tuple[DiT, Objective]:
    """An expert from its folder in the released layout (``export/`` of a run, ``expert_k/`` of a model).

    Args:
        folder: holds ``config.json`` and ``diffusion_pytorch_model.safetensors``.
        latent_size: side of the latent where the config does not say, as the released ones do not.
        ignore: names of tensors that the file may hold besides.
        device: where the weights go; on CPU they stay mapped to the file.
        ignore_settings: names of unknown settings that ``config.json`` may hold besides.
        norm_eps: epsilon of the norms; ``None`` is the config's, or else 1e-6.

    Returns:
        the module in evaluation mode, without gradients, in the file's precision; and what its output means.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a setting or a tensor does not fit; the message says which, in which file, and what to do.
    """
    config = expert_config(folder, ignore_settings, norm_eps)
    try:
        meaning = objective(*stated_objective(config))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder.uri}/config.json: {error}") from error
    return _load(DiT, config, folder, EXPERT_FILE, latent_size, ignore, device), meaning


def load_router(
    folder: Folder,
    latent_size: int,
    ignore: Collection[str] = (),
    device: str = "cpu",
    ignore_settings: Collection[str] = (),
    norm_eps: float | None = None,
) -> Router:
    """A router from its folder in the released layout; see :func:`load_expert`."""
    config = _read(folder, Router, ignore_settings, norm_eps)
    return _load(Router, config, folder, ROUTER_FILE, latent_size, ignore, device)


N = TypeVar("N", DiT, Router)


def _load(kind: type[N], config: dict[str, Any], folder: Folder, name: str, latent_size: int, ignore: Collection[str], device: str) -> N:
    """A network made on the ``meta`` device, once the file's header says that it has such sizes, and filled."""
    from safetensors import safe_open

    try:
        keywords = kind.keywords({"image_size": latent_size, **config})
        sizes = _sizes(kind, keywords, latent_size)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder.uri}/config.json: {error}") from error
    where = f"{folder.uri}/{name}"
    if not folder.exists(name):
        refuse_pickles(folder, name)
        raise FileNotFoundError(f"{where} does not exist; put the weights there as safetensors")
    path = folder.local_copy(name)
    header = read_header(path, where)
    _check_sizes(where, header, sizes)
    try:
        with torch.device("meta"), _Uninitialised():
            module = kind(**keywords)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{folder.uri}/config.json: {error}") from error
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    check_header(where, header, wanted, ignore)
    with safe_open(path, framework="pt", device=device) as file:
        tensors = {key: file.get_tensor(key) for key in wanted}
    module.load_state_dict(tensors, assign=True)
    module.to(device)  # what no file holds: constants
    module.eval().requires_grad_(False)
    return module


def _sizes(kind: type[DiT] | type[Router], keywords: dict[str, Any], latent_size: int) -> dict[str, int]:
    """What decides how much memory and time it takes to make a network, even without weights."""
    plain = {key: one.default for key, one in inspect.signature(kind).parameters.items()}
    sizes = {key: keywords.get(key, plain[key]) for key in ("image_size", "patch_size", "hidden_size", "num_layers", "num_heads")}
    for key, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{key} is {value!r}; it must be a whole number above 0")
    if sizes["image_size"] != latent_size:
        raise ValueError(f"image_size is {sizes['image_size']}, the rest of the model has {latent_size}; take all parts from one model")
    if sizes["num_layers"] > MOST_LAYERS:
        raise ValueError(f"num_layers is {sizes['num_layers']}; at most {MOST_LAYERS} are made")
    return sizes


def _check_sizes(where: str, header: Header, sizes: dict[str, int]) -> None:
    """Raise ValueError for a table of positions larger than the file's: it is made as the network is, and then compared."""
    table = (1, (sizes["image_size"] // sizes["patch_size"]) ** 2, sizes["hidden_size"])
    if (found := header.get("pos_embed")) is None:
        raise ValueError(does_not_fit(where, [f"tensor pos_embed {table} is missing from the file"]))
    if math.prod(found[0]) < math.prod(table):
        raise ValueError(does_not_fit(where, [f"tensor pos_embed has shape {found[0]} in the file, {table} in the network"]))


class _Uninitialised(TorchFunctionMode):
    """Leaves out the drawing of initial values, which would import sympy when done on the meta device (seconds, in every process)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))


def read_config(folder: Folder) -> dict[str, Any]:
    """``config.json`` of a folder. Raises FileNotFoundError, ValueError."""
    config = folder.read_json("config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{folder.uri}/config.json must hold keys and values, not {type(config).__name__}")
    return config


def expert_config(folder: Folder, ignore_settings: Collection[str] = (), norm_eps: float | None = None) -> dict[str, Any]:
    """``config.json`` of an expert as :func:`load_expert` takes it: without the settings that are ignored, and with the epsilon that is given."""
    return _read(folder, DiT, ignore_settings, norm_eps)


def stated_objective(config: dict[str, Any]) -> tuple[str, str]:
    """Objective and noise schedule of an expert by its ``config.json``; the released ones name none, and are of flow matching."""
    return config.get("objective") or "flow", config.get("noise_schedule") or "cosine"


def _read(folder: Folder, kind: type[DiT] | type[Router], ignore_settings: Collection[str], norm_eps: float | None) -> dict[str, Any]:
    config = {key: value for key, value in read_config(folder).items() if key in kind.known_settings() or key not in ignore_settings}
    check_norm_eps(norm_eps)
    return config if norm_eps is None else {**config, "norm_eps": norm_eps}


def check_norm_eps(norm_eps: float | None) -> None:
    """Raise ValueError for an epsilon of norms that is none."""
    if norm_eps is not None and not 0 < norm_eps < 1:
        raise ValueError(f"norm_eps: {norm_eps} must be between 0 and 1; 1e-6 and 1e-5 are usual")


def refuse_pickles(folder: Folder, name: str, among: Iterable[str] | None = None) -> None:
    """Raise ValueError if pickled weights are where safetensors are expected."""
    names = [entry.name for entry in folder.files()] if among is None else among
    for found in names:
        if found.endswith(PICKLED):
            raise ValueError(
                f"{folder.uri}/{found} is refused: pickled weights can run code when they are read. "
                f"Where you trust them, convert them: python -m jobs.convert {folder.uri}/{found} {folder.uri}/{name}"
            )
