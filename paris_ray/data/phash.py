"""Perceptual hashes: 64 bits that near-duplicates share but for a few, and all pairs that do. NumPy alone, the same bits everywhere."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE, LOW = 32, 8
DISTANCE = 3
"""Bits by which hashes of near-duplicates may differ."""
BANDS = 4
"""Of 16 bits: two hashes that differ in three bits or fewer are equal in one of four bands."""
LARGEST = 1024
"""Hashes that may share a band. In a larger bucket not all pairs are compared, as their number grows with its square; it is reported."""

# Rows of a DCT-II in whole numbers: sums of products are exact, so neither a flat picture nor a symmetric one gets its bits from rounding errors.
_COSINES = np.rint(4096 * np.cos(np.pi * np.arange(LOW)[:, None] * (2 * np.arange(SIDE)[None] + 1) / (2 * SIDE))).astype(np.int64)


def phash(pixels: NDArray[np.uint8]) -> int:
    """Perceptual hash of a picture (Zauner 2010): its 32 × 32 grey version's 8 × 8 lowest DCT-II frequencies, each above their median or not.

    Args:
        pixels: (H, W, 3).

    Returns:
        64 bits; the first frequency, the mean, is the highest.
    """
    grey = Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    low = _COSINES @ np.asarray(grey, np.int64) @ _COSINES.T  # (8, 8)
    middle = np.sort(low, axis=None)[[31, 32]].sum()
    return int.from_bytes(np.packbits(2 * low > middle).tobytes(), "big")


def near_components(hashes: NDArray[np.uint64], groups: NDArray[np.uint64] | None = None, largest: int = LARGEST) -> tuple[NDArray[np.int32], int]:
    """What hangs together by pairs of different groups within :data:`DISTANCE` bits.

    Args:
        hashes: (N,).
        groups: (N,) of each hash; ``None``: each is its own group.
        largest: the size of a bucket that is compared pair by pair; the work is at most 2 · N · ``largest``.

    Returns:
        (N,) the component of each hash, and how many hashes share too large a bucket in one of the bands, so that pairs of theirs may be missed.
    """
    n = len(hashes)
    component = np.arange(n, dtype=np.int32)
    unchecked = np.zeros(n, bool)
    found: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
    for band in range(BANDS):
        keys = (hashes >> np.uint64(16 * band)).astype(np.uint16)
        small = np.bincount(keys, minlength=1 << 16) <= largest
        unchecked |= ~small[keys]
        order = np.argsort(keys, kind="stable").astype(np.int32)
        keys = keys[order]
        at = np.flatnonzero(small[keys]).astype(np.int32)
        for step in range(1, largest):
            # Neighbours in the order of the band, then those two apart, and so on while they share a bucket.
            at = at[at < n - step]
            at = at[keys[at] == keys[at + step]]
            if not len(at):
                break
            one, other = order[at], order[at + step]
            near = np.bitwise_count(hashes[one] ^ hashes[other]) <= DISTANCE
            if groups is not None:
                near &= groups[one] != groups[other]
            found.append((one[near], other[near]))
            if sum(len(pair) for pair, _ in found) > n:  # a crowd of look-alikes has more pairs than members
                component, found = _join(component, found), []
        component, found = _join(component, found), []
    return component, int(unchecked.sum())


def _join(component: NDArray[np.int32], pairs: list[tuple[NDArray[np.int32], NDArray[np.int32]]]) -> NDArray[np.int32]:
    """Components after joining pairs of nodes."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    one, other = (component[np.concatenate([pair[side] for pair in pairs])] if pairs else component[:0] for side in (0, 1))
    graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(component),) * 2)
    return np.asarray(connected_components(graph, directed=False)[1], np.int32)[component]
