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
RANGES = 16
"""Of a band's keys, gone through in turn: what is sorted and compared at once is a sixteenth of the hashes, where these are spread evenly."""
LARGEST = 1024
"""Hashes that may share a band. In a larger bucket not all pairs are compared, as their number grows with its square; it is reported."""

_BLOCK = 1 << 16

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
    pairs = 0
    for band in range(BANDS):
        keys = np.empty(n, np.uint16)
        for low in range(0, n, _BLOCK):
            keys[low : low + _BLOCK] = hashes[low : low + _BLOCK] >> np.uint64(16 * band) & np.uint64(0xFFFF)
        for part in range(RANGES):
            inside = np.flatnonzero(keys // (2**16 // RANGES) == part).astype(np.int32)
            order = inside[np.argsort(keys[inside], kind="stable")]
            own = keys[order]
            small = np.bincount(own, minlength=1 << 16)[own] <= largest
            unchecked[order[~small]] = True
            at = np.flatnonzero(small).astype(np.int32)
            for step in range(1, largest):
                # Neighbours in the order of the band, then those two apart, and so on while they share a bucket.
                at = at[at < len(own) - step]
                at = at[own[at] == own[at + step]]
                if not len(at):
                    break
                one, other = order[at], order[at + step]
                near = np.bitwise_count(hashes[one] ^ hashes[other]) <= DISTANCE
                if groups is not None:
                    near &= groups[one] != groups[other]
                found.append((one[near], other[near]))
                pairs += int(near.sum())
                if pairs > n:  # a crowd of look-alikes has more pairs than members
                    component, found, pairs = _join(component, found), [], 0
        component, found, pairs = _join(component, found), [], 0
    return component, int(unchecked.sum())


def _join(component: NDArray[np.int32], pairs: list[tuple[NDArray[np.int32], NDArray[np.int32]]]) -> NDArray[np.int32]:
    """Components after joining pairs of nodes, each known by one of them."""
    if not any(len(one) for one, _ in pairs):
        return component
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # Of all nodes the ends of pairs are few: the graph is theirs alone.
    ends, at = np.unique(np.concatenate([component[pair[side]] for side in (0, 1) for pair in pairs]), return_inverse=True)
    one, other = np.split(at.astype(np.int32), 2)
    graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(ends),) * 2)
    _, label = connected_components(graph, directed=False)
    first = np.empty(len(ends), np.int32)
    first[label[::-1]] = ends[::-1]
    name = np.arange(len(component), dtype=np.int32)
    name[ends] = first[label]
    return name[component]
