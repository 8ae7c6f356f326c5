"""Is the named thing at the named place on the named ground? Read from pictures of scenes by least squares; no labels, no network. NumPy only.

Of a picture, brought to 32 pixels, the ground is read first: the colour whose two shades most pixels have, then the texture and phase that explain
which pixels have which shade. Each quarter is then compared with every thing of the vocabulary, in both sizes, wherever in it that can lie, and with
the bare ground; the least square of differences decides. As no thing leaves its quarter, that is the most likely scene under white noise, given the
ground.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from paris_ray.data.openmoji import GROUNDS
from paris_ray.data.scene_pictures import PERIOD, QUARTER, SHADE, TEXTURES, UNITS, WIDTHS, shade_mask, sprite
from paris_ray.data.scenes import COLOURS, PLACES, SIZES, Scene, Thing, vocabulary

_NEAR = 0.25
"""A pixel that is farther than this from both shades of a colour (Euclidean, RGB in [0, 1]) is none of that ground's: all such count alike."""

_BATCH = 64


@dataclass(frozen=True, slots=True)
class Reading:
    """What is seen in a picture: the thing at each place that has one, and the ground."""

    things: dict[str, Thing]
    colour: str
    texture: str


class SceneScorer:
    """Reads scenes.

    Args:
        names: the things that may be there, of :func:`paris_ray.data.scenes.vocabulary`.

    Raises:
        ValueError: a name is not of the vocabulary.
    """

    def __init__(self, names: Sequence[str]):
        codes = vocabulary()
        if unknown := [name for name in names if name not in codes]:
            raise ValueError(f"names: {unknown[0]!r} is not of the vocabulary of scenes; take names from Scenes.names")
        self._what: list[tuple[str, str] | None] = [None]  # the bare ground comes first
        weights = [np.zeros((QUARTER, QUARTER, 8), np.float32)]
        own = [0.0]
        for name in names:
            for size, width in zip(SIZES, WIDTHS, strict=True):
                drawn = sprite(codes[name], width)
                colour, opacity = drawn[..., :3], drawn[..., 3:]
                # With d = x − g: |x − (p + (1−a)g)|² − |d|² = −2d·p + 2a(d·g) + |p|² − 2a(p·g) + a²|g|², p the premultiplied colour, a the opacity.
                parts = np.concatenate([-2 * colour, 2 * opacity, -2 * opacity * colour, opacity**2], -1)
                room = QUARTER - width + 1
                for top in range(room):
                    for left in range(room):
                        placed = np.zeros((QUARTER, QUARTER, 8), np.float32)
                        placed[top : top + width, left : left + width] = parts
                        weights.append(placed)
                        own.append(float(np.square(colour).sum()))
                        self._what.append((name, size))
        self._weights = np.stack(weights).reshape(len(weights), -1).T.copy()  # (16·16·8, templates)
        self._own = np.array(own, np.float32)
        phases = [(texture, phase) for texture in TEXTURES for phase in _phases(texture)]
        self._textures = [texture for texture, _ in phases]
        self._masks = np.stack([shade_mask(texture, phase) for texture, phase in phases]).astype(np.float32)  # (M, 32, 32)
        light = np.array(list(GROUNDS.values()), np.float32) / 255
        self._shades = np.stack([light, SHADE * light], 1)  # (colours, 2, 3)

    def read(self, pictures: NDArray[np.uint8]) -> list[Reading]:
        """Read N pictures, (N, S, S, 3), S at least 32.

        Raises:
            ValueError: they are not square, or too small.
        """
        height, width = pictures.shape[1:3]
        if height != width or height < UNITS:
            raise ValueError(f"pictures are {width} × {height}; scenes are square, of at least {UNITS} pixels")
        found: list[Reading] = []
        for start in range(0, len(pictures), _BATCH):
            found += self._read(_reduced(pictures[start : start + _BATCH]))
        return found

    def _read(self, x: NDArray[np.float32]) -> list[Reading]:
        colour, mask, ground = self._ground(x)
        d = x - ground
        # Features that the expansion above is linear in, quarter by quarter.
        features = np.concatenate([d, (d * ground).sum(-1, keepdims=True), ground, np.square(ground).sum(-1, keepdims=True)], -1)
        n, q = len(x), QUARTER
        quarters = features.reshape(n, 2, q, 2, q, 8).transpose(0, 1, 3, 2, 4, 5).reshape(n * 4, q * q * 8)
        best = (quarters @ self._weights + self._own).argmin(1).reshape(n, 4)
        readings = []
        for i in range(n):
            seen = {place: what for place, k in zip(PLACES, best[i].tolist(), strict=True) if (what := self._what[k]) is not None}
            things = {place: Thing(name, size, place) for place, (name, size) in seen.items()}
            readings.append(Reading(things, COLOURS[colour[i]], self._textures[mask[i]]))
        return readings

    def _ground(self, x: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Of pictures (N, 32, 32, 3): the colour, the mask of its darker shade, and the bare ground (N, 32, 32, 3)."""
        n = len(x)
        pixels = x.reshape(n, -1, 3)
        far = np.square(pixels[:, :, None, None] - self._shades).sum(-1)  # (N, pixels, colours, 2)
        near = np.minimum(far.min(-1), _NEAR**2)
        colour = near.sum(1).argmin(1)
        own = self._shades[colour]  # (N, 2, 3)
        far = far[np.arange(n), :, colour]  # (N, pixels, 2)
        valid = far.min(-1) < _NEAR**2
        # The tone: how far pixels of the ground are from its shades, most of them.
        off = pixels - np.take_along_axis(own, far.argmin(-1)[..., None], 1)
        tone = np.nan_to_num(np.nanmedian(np.where(valid[..., None], off, np.nan), 1)) if valid.any(1).all() else np.zeros((n, 3), np.float32)
        light = own[:, 0] + tone
        # How dark each pixel is between the shades, 0 to 1; then least squares over the masks.
        dark = (1 - (pixels * light[:, None]).sum(-1) / np.square(light).sum(-1)[:, None]) / (1 - SHADE)
        weight = (valid & (np.abs(dark - 0.5) < 1)).astype(np.float32)
        masks = self._masks.reshape(len(self._masks), -1)
        cost = weight @ masks.T - 2 * (weight * dark) @ masks.T
        mask = cost.argmin(1)
        ground = light[:, None, None] * np.where(self._masks[mask] > 0, np.float32(SHADE), np.float32(1))[..., None]
        return colour, mask, ground.astype(np.float32)


def _phases(texture: str) -> list[tuple[int, int]]:
    """Phases at which a texture looks different."""
    rows = 1 if texture in ("plain", "striped") else PERIOD
    columns = 1 if texture == "plain" else PERIOD
    found = [(y, x) for y in range(rows) for x in range(columns)]
    return [(y, x) for y, x in found if y < PERIOD // 2] if texture == "checked" else found


def _reduced(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pictures at 32 pixels, means of areas, in [0, 1]."""
    if pictures.shape[1] != UNITS:
        pictures = np.stack([np.asarray(Image.fromarray(one).resize((UNITS, UNITS), Image.Resampling.BOX)) for one in pictures])
    return pictures.astype(np.float32) / np.float32(255)


# -- scores -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SceneScores:
    """How well N pictures show what was asked; each (N,), between 0 and 1.

    Attributes:
        objects: share of the named things that are at their place, in whatever size.
        sizes: share that is there in the named size.
        colour: whether the ground has the named colour.
        texture: whether it has the named texture.
        clean: whether no other place has a thing.
        all: whether everything is right.
    """

    objects: NDArray[np.float64]
    sizes: NDArray[np.float64]
    colour: NDArray[np.float64]
    texture: NDArray[np.float64]
    clean: NDArray[np.float64]
    all: NDArray[np.float64]


SCORES = tuple(field.name for field in fields(SceneScores))
"""Names of the scores, in order."""


def score(asked: Sequence[Scene], seen: Sequence[Reading]) -> SceneScores:
    """Compare what captions say with what is seen, picture by picture.

    Raises:
        ValueError: they are not equally many.
    """
    if len(asked) != len(seen):
        raise ValueError(f"asked has {len(asked)} scenes, seen {len(seen)} readings; they must be of the same pictures")
    return SceneScores(*_compare(*_encode(asked, seen)))


def chance(asked: Sequence[Scene], seen: Sequence[Reading]) -> dict[str, float]:
    """What each score would be on average if the captions were shuffled: the exact mean over all permutations, that is over all N² pairs."""
    one, other = _encode(asked, seen)
    columns = [column[None] for column in other]
    total = np.sum([_compare([column[i : i + 1, None] for column in one], columns).sum((1, 2)) for i in range(len(asked))], 0)
    return dict(zip(SCORES, (total / len(asked) / len(seen)).tolist(), strict=True))


def _encode(asked: Sequence[Scene], seen: Sequence[Reading]) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Scenes and readings as numbers, equal where they are the same.

    Of both: names and sizes at each place, (N, 4), −1 where there is none; colours and textures, (N,).
    """
    numbers: dict[str, int] = {}

    def number(word: str) -> int:
        return numbers.setdefault(word, len(numbers))

    def columns(things: list[dict[str, Thing]], grounds: Sequence[Scene | Reading]) -> list[NDArray[np.int64]]:
        names = [[number(one[place].name) if place in one else -1 for place in PLACES] for one in things]
        sizes = [[number(one[place].size) if place in one else -1 for place in PLACES] for one in things]
        found = [names, sizes, [number(one.colour) for one in grounds], [number(one.texture) for one in grounds]]
        return [np.array(column, np.int64) for column in found]

    return columns([{one.place: one for one in scene.things} for scene in asked], asked), columns([one.things for one in seen], seen)


def _compare(asked: Sequence[NDArray[np.int64]], seen: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """The scores of what :func:`_encode` made, as (6, …); both may be broadcast."""
    names, sizes, colour, texture = (one == other for one, other in zip(asked, seen, strict=True))
    named = asked[0] >= 0
    count = named.sum(-1)
    objects, exact = (named & names).sum(-1) / count, (named & names & sizes).sum(-1) / count
    clean = (named | (seen[0] < 0)).all(-1)
    return np.stack(
        [np.asarray(column, float) for column in np.broadcast_arrays(objects, exact, colour, texture, clean, (exact == 1) & colour & texture & clean)]
    )
