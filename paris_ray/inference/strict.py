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
from paris_ray.models import DiT, Router
from paris_ray.storage import Folder

EXPERT_FILE = "diffusion_pytorch_model.safetensors"
ROUTER_FILE = "pytorch_model.safetensors"

PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
FLOATS = {"F64", "F32", "F16", "BF16"}


def load_expert(folder: Folder, latent_size: int, ignore: Collection[str] = (), device: str = "cpu") -> tuple[DiT, Objective]:
    """An expert from its folder in the released layout (``export/`` of a run, ``expert_k/`` of a model).

    Args:
        folder: holds ``config.json`` and ``diffusion_pytorch_model.safetensors``.
        latent_size: side of the latent where the config does not say, as the released ones do not.
        ignore: names of tensors that the file may hold besides.
        device: where the weights go; on CPU they stay mapped to the file.

    Returns:
        the module in evaluation mode, without gradients, in the file's precision; and what its output means.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a setting or a tensor does not fit; the message says which, in which file, and what to do.
    """
    config = read_config(folder)
    kind, schedule = config.get("objective") or "flow", config.get("noise_schedule") or "cosine"
    try:
        meaning = objective(kind, schedule)
        with torch.device("meta"), _Uninitialised():
            module = DiT.from_config({"image_size": latent_size, **config})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder.uri}/config.json: {error}") from error
    load_tensors(module, folder, EXPERT_FILE, ignore, device)
    return module, meaning


def load_router(folder: Folder, latent_size: int, ignore: Collection[str] = (), device: str = "cpu") -> Router:
    """A router from its folder in the released layout; see :func:`load_expert`."""
    config = read_config(folder)
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


def load_tensors(module: nn.Module, folder: Folder, name: str, ignore: Collection[str] = (), device: str = "cpu") -> None:
    """Fill a module made on the ``meta`` device from a safetensors file; evaluation mode, no gradients.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_expert`.
    """
    from safetensors import SafetensorError, safe_open

    where = f"{folder.uri}/{name}"
    if not folder.exists(name):
        refuse_pickles(folder, name)
        raise FileNotFoundError(f"{where} does not exist; put the weights there as safetensors")
    path = folder.local_copy(name)
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    try:
        with safe_open(path, framework="pt", device=device) as file:
            found = set(file.keys())
            problems = [f"tensor {key} {shape} is missing from the file" for key, shape in wanted.items() if key not in found]
            problems += [f"tensor {key} is in the file but not in the network" for key in sorted(found - wanted.keys() - set(ignore))]
            for key in wanted.keys() & found:
                piece = file.get_slice(key)
                if tuple(piece.get_shape()) != wanted[key]:
                    problems.append(f"tensor {key} has shape {tuple(piece.get_shape())} in the file, {wanted[key]} in the network")
                elif piece.get_dtype() not in FLOATS:
                    problems.append(f"tensor {key} is of type {piece.get_dtype()}; allowed are {', '.join(sorted(FLOATS))}")
            if problems:
                raise ValueError(_explain(where, problems))
            tensors = {key: file.get_tensor(key) for key in wanted}
    except SafetensorError as error:
        raise ValueError(f"{where} is not a whole safetensors file ({error}); copy it again") from error
    module.load_state_dict(tensors, assign=True)
    module.to(device)  # what no file holds: constants
    module.eval().requires_grad_(False)


def _explain(where: str, problems: list[str]) -> str:
    shown = "".join(f"\n  - {problem}" for problem in problems[:10])
    more = f"\n  … and {len(problems) - 10} more" if len(problems) > 10 else ""
    return f"{where} does not fit the config.json beside it:{shown}{more}\nUse the weights and the config.json of one and the same network."


def refuse_pickles(folder: Folder, name: str, among: Iterable[str] | None = None) -> None:
    """Raise ValueError if pickled weights are where safetensors are expected."""
    names = [entry.name for entry in folder.files()] if among is None else among
    for found in names:
        if found.endswith(PICKLED):
            raise ValueError(
                f"{folder.uri}/{found} is refused: pickled weights can run code when they are read. "
                f"Where you trust them, convert them: python -m jobs.convert {folder.uri}/{found} {folder.uri}/{name}"
            )
