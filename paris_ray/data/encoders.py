"""What the frozen encoders have in common: fingerprints, batches, precision, pooling, files of the hub. Importing this imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Ids = NDArray[np.int32]

FILE = "encoders.json"
NULL_TEXT = "null_text.safetensors"

CPU_ROWS = 8
"""Rows of one forward pass on a CPU. Matrix products there choose their kernels by shape, so only a constant shape gives a row the same bytes
alone and in a batch; 8 costs a single caption little."""

TEXT_ROWS = 256
"""Captions of one forward pass on a GPU, at most."""


def weights_fingerprint(weights: Mapping[str, Any]) -> str:
    """Fingerprint of named weights (NumPy arrays or tensors): 32 hex digits of a hash over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name].detach().cpu().numpy() if hasattr(weights[name], "detach") else weights[name])
        digest.update(f"{name}:{array.dtype}:{array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:32]


@contextmanager
def frozen(device: torch.device | str) -> Iterator[None]:
    """How encoders run: without gradients, and in their own precision where the caller trains in a lower one under autocast."""
    import torch

    with torch.inference_mode(), torch.autocast(torch.device(device).type, enabled=False):
        yield


def pass_rows(left: int, device: torch.device | str, on_gpu: int, on_cpu: int = CPU_ROWS) -> int:
    """Rows of the next forward pass.

    Args:
        left: rows still to go, at least 1.
        device: where the pass runs.
        on_gpu: the most on a GPU; fewer are filled up to the next power of two, so that there are few shapes and one caption costs one.
        on_cpu: always so many on a CPU.
    """
    return on_cpu if str(device).startswith("cpu") else min(on_gpu, 1 << (left - 1).bit_length())


def in_chunks(function: Callable[[Tensor], Tensor], rows: Tensor, device: torch.device | str, on_gpu: int, on_cpu: int = CPU_ROWS) -> Tensor:
    """Apply a function to rows in chunks of :func:`pass_rows`, the last one filled up with copies of its last row.

    Args:
        function: (n, …) → (n, …), each row on its own.
        rows: (N, …), N ≥ 1.
        device, on_gpu, on_cpu: see :func:`pass_rows`.
    """
    import torch

    results, done = [], 0
    while done < len(rows):
        size = pass_rows(len(rows) - done, device, on_gpu, on_cpu)
        chunk = rows[done : done + size]
        real = len(chunk)
        if real < size:
            chunk = torch.cat([chunk, chunk[-1:].expand(size - real, *chunk.shape[1:])])
        results.append(function(chunk)[:real])
        done += real
    return torch.cat(results)


def pool(states: Tensor, lengths: Tensor, pooling: str) -> Tensor:
    """One vector a caption, the mean over its real tokens or the last of them: states (N, T, D), lengths (N,) → (N, D)."""
    import torch

    lengths = lengths.to(states.device).long()
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), lengths - 1]
    real = torch.arange(states.shape[1], device=states.device) < lengths[:, None]  # (N, T)
    return (states * real[..., None]).sum(1) / lengths[:, None]


class FrozenText:
    """What the text encoders share; see :class:`paris_ray.data.text.TextEncoder`."""

    kind: str
    pooling: str
    width: int
    max_length: int
    fingerprint: str

    def __init__(self, model: Any, device: str):
        self.model = model.eval().requires_grad_(False)
        self.to(device)

    def to(self, device: str) -> None:
        """Move it to a device."""
        self.model.to(device)
        self.device = device

    def _states(self, ids: Tensor, lengths: Tensor) -> Tensor:
        raise NotImplementedError

    def encode(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Ids (N, T) and lengths (N,) → states (N, T, D) float32, on the encoder's device."""
        import torch

        if ids.shape[1:] != (self.max_length,):
            raise ValueError(f"ids have the shape {tuple(ids.shape)}; this encoder takes (N, {self.max_length})")
        both = torch.cat([ids.long(), lengths.long()[:, None]], dim=1).to(self.device)  # (N, T + 1)
        if not len(both):
            return torch.empty((0, self.max_length, self.width), device=self.device)
        with frozen(self.device):
            states = in_chunks(lambda rows: self._states(rows[:, :-1], rows[:, -1]).float(), both, self.device, TEXT_ROWS)
        return states.clone()  # a plain tensor: inference tensors cannot enter a loss

    def pool(self, states: Tensor, lengths: Tensor) -> Tensor:
        """States (N, T, D) and lengths (N,) → one vector each (N, D)."""
        return pool(states, lengths, self.pooling)

    def meta(self) -> dict[str, Any]:
        """What ``encoders.json`` and ``paris.json`` say about it."""
        return {
            "kind": self.kind,
            "width": self.width,
            "max_length": self.max_length,
            "pooling": self.pooling,
            "fingerprint": self.fingerprint,
        }


def default_device(gpus: float) -> str:
    """Where encoders go: ``cuda`` when a GPU was asked for. Raises RuntimeError when it is not there."""
    import torch

    if gpus <= 0:
        return "cpu"
    if not torch.cuda.is_available():
        raise RuntimeError(f"data.encoder_gpus is {gpus}, but torch sees no GPU on this node; install torch with CUDA there, or set it to 0")
    return "cuda"


def hub_file(repository: str, name: str) -> str | None:
    """Local path of a file of a Hugging Face repository, ``None`` if the repository has no such file.

    Raises:
        ConfigError: the hub cannot be reached and the file is not in its cache.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from paris_ray.config import ConfigError

    try:
        return str(hf_hub_download(repository, name))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise ConfigError(
            f"{repository!r} is not a local folder, and {name} could not be fetched from the Hugging Face hub: {str(error).splitlines()[0]} "
            "Give the path of a local folder, or a repository that this machine can reach."
        ) from None
