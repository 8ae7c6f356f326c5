"""Random draws as functions of (seed, stream, index), so that no draw depends on what was drawn before it."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from numpy.typing import NDArray


@functools.lru_cache(maxsize=256, typed=True)  # typed: 1 and True are printed differently
def key(*parts: object) -> int:
    """A 63-bit integer from anything printable: a hash, never a sum, so that neighbouring seeds share nothing."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, stream: str, index: int) -> np.random.Generator:
    """The generator of one sample of one stream: Philox, keyed by (seed, stream), its counter set by the index."""
    return np.random.Generator(np.random.Philox(key=key(seed, stream), counter=[0, 0, 0, index]))


def normal(seed: int, stream: str, indices: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal draws for each index: (len(indices), *shape), float32."""
    out = np.empty((len(indices), *shape), np.float32)
    for row, index in enumerate(indices):
        generator(seed, stream, int(index)).standard_normal(out=out[row], dtype=np.float32)
    return out


def uniform(seed: int, stream: str, indices: NDArray[np.int64]) -> NDArray[np.float64]:
    """One uniform draw in [0, 1) for each index: (len(indices),)."""
    return np.array([generator(seed, stream, int(index)).random() for index in indices])


def permutation(seed: int, stream: str, epoch: int, n: int) -> NDArray[np.int64]:
    """The order of ``n`` rows in an epoch."""
    return generator(seed, stream, epoch).permutation(n)
