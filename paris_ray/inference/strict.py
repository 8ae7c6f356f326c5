"""Networks from safetensors files, strictly.

Every tensor is there with its shape and none besides; nothing is unpickled; no setting that changes the maths is ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from paris_ray.diffusion.path import Objective, objective
from paris_ray.headers import check_header, read_header
from paris_ray.layout import EXPERT_FILE, ROUTER_FILE
from paris_ray.models import DiT, Router
from paris_ray.storage import Folder

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
        with torch.device("meta"), _Uninitialised():
            module = DiT.from_config({"image_size": latent_size, **config})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder.uri}/config.json: {error}") from error
    load_tensors(module, folder, EXPERT_FILE, ignore, device)
    return module, meaning


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
    try:
        with torch.device("meta"), _Uninitialised():
            module = Router.from_config({"image_size": latent_size, **config})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder.uri}/config.json: {error}") from error
    load_tensors(module, folder, ROUTER_FILE, ignore, device)
    return module


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


def load_tensors(module: nn.Module, folder: Folder, name: str, ignore: Collection[str] = (), device: str = "cpu") -> None:
    """Fill a module made on the ``meta`` device from a safetensors file; evaluation mode, no gradients.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_expert`.
    """
    from safetensors import safe_open

    where = f"{folder.uri}/{name}"
    if not folder.exists(name):
        refuse_pickles(folder, name)
        raise FileNotFoundError(f"{where} does not exist; put the weights there as safetensors")
    path = folder.local_copy(name)
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    check_header(where, read_header(path, where), wanted, ignore)
    with safe_open(path, framework="pt", device=device) as file:
        tensors = {key: file.get_tensor(key) for key in wanted}
    module.load_state_dict(tensors, assign=True)
    module.to(device)  # what no file holds: constants
    module.eval().requires_grad_(False)


def refuse_pickles(folder: Folder, name: str, among: Iterable[str] | None = None) -> None:
    """Raise ValueError if pickled weights are where safetensors are expected."""
    names = [entry.name for entry in folder.files()] if among is None else among
    for found in names:
        if found.endswith(PICKLED):
            raise ValueError(
                f"{folder.uri}/{found} is refused: pickled weights can run code when they are read. "
                f"Where you trust them, convert them: python -m jobs.convert {folder.uri}/{found} {folder.uri}/{name}"
            )
