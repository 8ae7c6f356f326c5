"""What the frozen encoders have in common: fingerprints, fixed batches, folders made local. Importing this imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FILE = "encoders.json"
NULL_TEXT = "null_text.safetensors"

CPU_ROWS = 8
"""Rows of one forward pass on a CPU. Matrix products there choose their kernels by shape, so only a constant shape gives a row the same bytes
alone and in a batch; 8 costs a single caption little."""


def weights_fingerprint(weights: Mapping[str, Any]) -> str:
    """Fingerprint of named weights (NumPy arrays or tensors): 32 hex digits of a hash over names, types, shapes and bytes."""
    import numpy as np

    digest = hashlib.sha256()
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name].detach().cpu().numpy() if hasattr(weights[name], "detach") else weights[name])
        digest.update(f"{name}:{array.dtype}:{array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:32]


def in_chunks(function: Callable[[Tensor], Tensor], rows: Tensor, size: int) -> Tensor:
    """Apply a function to rows in chunks of one constant size, the last one filled up with copies of its last row.

    Args:
        function: (size, …) → (size, …), each row on its own.
        rows: (N, …), N ≥ 1.
        size: rows at once.
    """
    import torch

    results = []
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        real = len(chunk)
        if real < size:
            chunk = torch.cat([chunk, chunk[-1:].expand(size - real, *chunk.shape[1:])])
        results.append(function(chunk)[:real])
    return torch.cat(results)


def default_device(gpus: float) -> str:
    """Where encoders go: ``cuda`` when a GPU was asked for. Raises RuntimeError when it is not there."""
    import torch

    if gpus <= 0:
        return "cpu"
    if not torch.cuda.is_available():
        raise RuntimeError(f"data.encoder_gpus is {gpus}, but torch sees no GPU on this node; install torch with CUDA there, or set it to 0")
    return "cuda"


def chunk_rows(device: torch.device | str, on_gpu: int) -> int:
    """Rows of one forward pass: constant and small on a CPU, as given elsewhere."""
    return CPU_ROWS if str(device).startswith("cpu") else on_gpu


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
