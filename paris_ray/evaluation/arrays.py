"""Arrays as files of a folder: NumPy's own format, nothing pickled."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_ray.storage import Folder


def save(folder: Folder, name: str, array: NDArray[Any]) -> None:
    """Write ``name.npy``."""
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=False)
    folder.write_bytes(f"{name}.npy", sink.getvalue())


def load(folder: Folder, name: str) -> NDArray[Any]:
    """Read ``name.npy``. Raises FileNotFoundError."""
    return np.asarray(np.load(io.BytesIO(folder.read_bytes(f"{name}.npy")), allow_pickle=False))
