"""How far pictures are, as a set, from originals of other captions: in the features of the encoder that judges, and in their pixels.

No torch, but for a codec that has to decode the originals.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from paris_ray.config import PatchPcaCodec
from paris_ray.evaluation.compare_captions import choose
from paris_ray.evaluation.compare_config import CompareConfig
from paris_ray.evaluation.compare_plan import axes_for
from paris_ray.evaluation.distances import Reference, frechet, moments
from paris_ray.evaluation.intervals import Floor, Interval, sets_interval, split_floor
from paris_ray.evaluation.protocol import read_latents
from paris_ray.manifest import published
from paris_ray.storage import Folder

WIDE = 256
"""Features of more numbers than this have few bootstrap draws: each takes the roots of two matrices."""

SIDE = 16
"""Pixels of pictures are averaged until they have so many a side, at most: along few axes nothing finer counts."""


class Space:
    """Pictures along the principal axes of originals.

    Pictures are measured to originals of other captions than their own: who draws each caption's own original again would otherwise be nearer than
    any original is to the others.

    Args:
        compare: the comparison.
        originals: (M, D) of validation rows.
        own: (M,) which of these have the captions that are judged.

    Attributes:
        axes: how many axes count, of how many.
        others: originals that pictures are measured to, along these axes.
    """

    def __init__(self, compare: CompareConfig, originals: NDArray[np.floating], own: NDArray[np.bool_]):
        self.compare, wide = compare, np.asarray(originals, np.float64)
        self.axes = (axes_for(compare, wide[~own], compare.seen_captions), wide.shape[1])
        self._basis = None if self.axes[0] == self.axes[1] else np.linalg.eigh(moments(wide[~own])[1])[1][:, -self.axes[0] :]
        self._originals, self._own = self.along(wide), own
        self.others = Reference(self._originals[~own])

    def along(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """(N, D) → (N, A)."""
        wide = np.asarray(points, np.float64)
        return wide if self._basis is None else wide @ self._basis

    def distance(self, sets: Sequence[NDArray[np.floating]]) -> float:
        """Fréchet distance to the other originals, lower is better, the mean over sets (N, D): FID in all of Inception's features."""
        return float(np.mean([self.others.frechet(self.along(one)) for one in sets]))

    def kernel(self, sets: Sequence[NDArray[np.floating]]) -> float:
        """Kernel distance, likewise, which is unbiased: KID in Inception's features."""
        return float(np.mean([self.others.kernel(self.along(one)) for one in sets]))

    def difference(self, better: Sequence[NDArray[np.floating]], worse: Sequence[NDArray[np.floating]]) -> Interval:
        """Of Fréchet distances of sets of the same captions and seeds, second minus first, so that above zero the first is better."""
        a, b = (np.stack([self.along(one) for one in sets], 1) for sets in (better, worse))
        repeats = 200 if self.axes[0] <= WIDE else 20
        return sets_interval(lambda x, y: self.others.frechet(y) - self.others.frechet(x), a, b, seed=self.compare.base.seed, repeats=repeats)

    def floor(self) -> Floor:
        """What originals get: as many as there are judged captions, or half of all, drawn anew and measured to those that are left."""
        return split_floor(lambda a, b: frechet(*moments(a), *moments(b)), self._originals, self.compare.base.seed, rows=self.compare.seen_captions)

    def of_originals(self) -> float | None:
        """The distance of the judged captions' own originals; ``None``: they are not known."""
        return self.others.frechet(self._originals[self._own]) if self._own.sum() > 1 else None


def own_originals(compare: CompareConfig, run: Folder, rows: int) -> NDArray[np.bool_]:
    """Which of the first validation rows have the captions that are judged, (rows,); none while there is no corpus.

    Args:
        compare: the comparison.
        run: with ``corpus/`` and ``clusters/``.
        rows: of which features were made.
    """
    if published(run / "corpus") is None:
        return np.zeros(rows, bool)
    judged = {one.id for one in choose(compare, run, "seen", compare.seen_captions)}
    return np.array([one.id in judged for one in choose(compare, run, "validation", rows)])


def original_pixels(compare: CompareConfig, run: Folder, rows: int) -> NDArray[np.float32] | None:
    """The first validation rows as the codec gives them back, as :func:`pixels`; ``None``: no corpus, or a codec that is slow without a GPU.

    Args:
        compare: the comparison.
        run: with ``corpus/``, ``clusters/`` and ``encoders/``.
        rows: how many.
    """
    if published(run / "corpus") is None or not isinstance(compare.base.data.codec, PatchPcaCodec):
        return None
    import torch

    from paris_ray.data.codec import load_codec

    codec = load_codec((run / "encoders").uri, (run / "encoders").read_json("encoders.json")["codec"])
    latents = read_latents(run / "corpus", [one.id for one in choose(compare, run, "validation", rows)])
    return np.concatenate([pixels(codec.decode(torch.from_numpy(latents[i : i + 512]))) for i in range(0, len(latents), 512)])


def pixels(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pictures (N, H, W, 3) as points, their samples in [0, 1], averaged over squares until there are :data:`SIDE` a side at most: (N, S · S · 3)."""
    n, height, width, channels = pictures.shape
    d = next(d for d in range(-(-max(height, width) // SIDE), max(height, width) + 1) if height % d == width % d == 0)
    squares = pictures.reshape(n, height // d, d, width // d, d, channels).astype(np.float32) / 255
    return squares.mean((2, 4)).reshape(n, -1)
