"""Retrieval, copies, chance and intervals: what the table's shares mean; calibration of a router. NumPy only.

A generated picture is *right* when its nearest original, among all rows of the corpus, belongs to its caption's group. Nearest is by cosine in the
space of the frozen image embedder, in float32, over embeddings as they are stored (float16).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COPY_PERCENTILE = 1.0
"""A picture closer to a training row than this percentile of the distances between nearest rows of different groups counts as a copy. Both as the
codec gives them back: what the codec changes is no originality."""

PIXEL_COPY = 2.0 / 255.0
"""A picture whose mean absolute difference from a training picture is below this (of the full range) is a copy to the eye."""

_BLOCK = 65_536


def unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows scaled to length 1, float32; a zero row stays zero. (N, D) → (N, D)."""
    wide = np.asarray(vectors, np.float32)
    length = np.sqrt(np.square(wide).sum(1, keepdims=True))
    return np.asarray(wide / np.where(length > 0, length, 1), np.float32)


def nearest(queries: NDArray[np.floating], originals: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The nearest original of each query by cosine; ties go to the first.

    Args:
        queries: (N, D).
        originals: (M, D), any float type; read in blocks, so that float16 never becomes float32 as a whole.

    Returns:
        index (N,) int64 and cosine distance 1 − cos (N,) float32.
    """
    if len(originals) == 0:
        raise ValueError("originals: there are none to compare with; the corpus is empty")
    if queries.shape[1:] != originals.shape[1:]:
        raise ValueError(f"queries have width {queries.shape[1:]}, originals {originals.shape[1:]}; both must come from the same embedder")
    asked = unit(queries)
    best = np.full(len(asked), -np.inf, np.float32)
    index = np.zeros(len(asked), np.int64)
    for start in range(0, len(originals), _BLOCK):
        similarity = asked @ unit(originals[start : start + _BLOCK]).T  # (N, block)
        here = similarity.argmax(1)
        value = similarity[np.arange(len(asked)), here]
        better = value > best
        best[better], index[better] = value[better], here[better] + start
    return index, (1.0 - best).astype(np.float32)


def copy_bound(embeddings: NDArray[np.floating], groups: Sequence[Hashable], sample: int = 4096) -> float:
    """The cosine distance below which a picture counts as a copy of a training row.

    For each row the distance to the nearest row of *another* group, then the :data:`COPY_PERCENTILE` of these: two originals that have nothing to do
    with each other are closer than this once in a hundred. The choice is ours; no source states one.

    Args:
        embeddings: (M, D) of the whole corpus.
        groups: the group of each row.
        sample: at most this many rows ask, evenly spaced; all rows answer.

    Returns:
        the bound; 0 when the corpus has one group only.
    """
    code = _codes(groups)
    asking = np.unique(np.linspace(0, len(code) - 1, min(sample, len(code))).astype(np.int64))
    asked = unit(embeddings[asking])
    best = np.full(len(asking), -np.inf, np.float32)
    for start in range(0, len(code), _BLOCK):
        similarity = asked @ unit(embeddings[start : start + _BLOCK]).T
        similarity[code[asking][:, None] == code[None, start : start + _BLOCK]] = -np.inf
        best = np.maximum(best, similarity.max(1))
    known = best[np.isfinite(best)]
    return float(max(0.0, np.percentile(1.0 - known, COPY_PERCENTILE))) if len(known) else 0.0


def pixel_difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean absolute difference of two batches of pictures, of the full range. (N, H, W, 3) twice → (N,) in [0, 1]."""
    return np.asarray(np.abs(a.astype(np.int16) - b.astype(np.int16)).reshape(len(a), -1).mean(1) / 255.0)


def border_colour(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean colour of the outermost ring of each picture, a sixteenth of the side wide (at least one pixel). (N, H, W, 3) → (N, 3) in [0, 1]."""
    height, width = images.shape[1:3]
    ring = max(1, min(height, width) // 16)
    mask = np.ones((height, width), bool)
    mask[ring:-ring, ring:-ring] = False
    return np.asarray(images[:, mask].reshape(len(images), -1, 3).mean(1) / 255.0)


GROUND_APART = 0.1
"""Two border colours are different grounds when some channel differs by more than this."""


def right_ground(picture: NDArray[np.uint8], originals: NDArray[np.uint8], own: int) -> bool | None:
    """Whether a picture has the ground of its own original rather than that of another original of the same group.

    Args:
        picture: (H, W, 3).
        originals: all originals of the group, (G, H, W, 3).
        own: the caption's own row among them.

    Returns:
        ``None`` where the group does not tell: it has one row, or two rows have the same ground.
    """
    colours = border_colour(originals)
    apart = np.abs(colours[:, None] - colours[None]).max(-1) > GROUND_APART
    if len(originals) < 2 or not apart[~np.eye(len(originals), dtype=bool)].all():
        return None
    distance = np.abs(border_colour(picture[None]) - colours).sum(1)
    return bool(distance.argmin() == own)


CALIBRATION_BINS = 15


def calibration_error(confidence: NDArray[np.floating], right: NDArray[np.bool_]) -> float:
    """Expected calibration error (Guo et al., ICML 2017, equation 3): how far a classifier's confidence is from how often it is right.

    The confidences are cut into 15 bins of equal width, open below and closed above; each bin's difference counts by its rows.

    Args:
        confidence: probability of the class that was named, (N,).
        right: whether it was the right one, (N,).

    Returns:
        between 0, where of the rows of each bin as many are right as it says, and 1; NaN for no rows.
    """
    if len(confidence) == 0:
        return math.nan
    bins = np.clip(np.ceil(confidence.astype(np.float64) * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
    return float(np.abs(np.bincount(bins, right - confidence.astype(np.float64))).sum() / len(confidence))


@dataclass(frozen=True)
class Share:
    """A count out of a number, with the 95 % interval of Wilson (JASA 22, 1927)."""

    hits: int
    of: int

    @property
    def value(self) -> float:
        return self.hits / self.of if self.of else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.hits, self.of)

    def as_json(self) -> dict[str, float | int | None]:
        low, high = self.interval
        return {"hits": self.hits, "of": self.of, "share": self.value if self.of else None, "low": low, "high": high}


def share(right: Sequence[bool | None]) -> Share:
    """Count the true among those that are known."""
    known = [bool(value) for value in right if value is not None]
    return Share(sum(known), len(known))


def wilson(hits: int, of: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a share; (0, 1) when nothing was counted.

    Raises:
        ValueError: hits is not between 0 and ``of``.
    """
    if not 0 <= hits <= of:
        raise ValueError(f"hits: {hits} must lie between 0 and of = {of}")
    if of == 0:
        return 0.0, 1.0
    p, z2 = hits / of, z * z
    centre = (p + z2 / (2 * of)) / (1 + z2 / of)
    half = z / (1 + z2 / of) * math.sqrt(p * (1 - p) / of + z2 / (4 * of * of))
    # The ends are exactly 0 and 1 there; rounding would miss them by 1e-17.
    return (0.0 if hits == 0 else centre - half), (1.0 if hits == of else centre + half)


def chance(asked: Sequence[Hashable], found: Sequence[Hashable]) -> float:
    """The share that would be right if the captions were shuffled: the exact mean over all permutations, Σ_g asked(g)·found(g) / n².

    Args:
        asked: the group of each caption.
        found: the group of each picture's nearest original.
    """
    if len(asked) != len(found):
        raise ValueError(f"asked has {len(asked)} groups, found {len(found)}; they must be the same pictures")
    if not asked:
        return math.nan
    have = Counter(found)
    return sum(count * have[group] for group, count in Counter(asked).items()) / len(asked) ** 2


def _codes(values: Sequence[Hashable]) -> NDArray[np.int64]:
    table: dict[Hashable, int] = {}
    return np.array([table.setdefault(value, len(table)) for value in values], np.int64)
