"""How scenes look: sprites of OpenMoji in the quarters of a picture, on grounds of two shades. NumPy and Pillow.

Lengths are in units, 32 to a side, so that a scene is the same at any size. A thing lies in its quarter, 16 units wide, anywhere that keeps it whole.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from paris_ray.data.openmoji import render

UNITS = 32
QUARTER = UNITS // 2
WIDTHS = (14, 10)
"""Of large and small things."""

TEXTURES = ("plain", "striped", "dotted", "checked")
PERIOD = 8
"""Of textures, in both directions; a row's phase is drawn."""
SHADE = 0.82
"""The darker shade of a ground is so much of the lighter one."""
TONE = 8
"""A row's ground differs from its colour by at most so much of 255 in each channel: a name is no single colour to be learnt by heart."""

_DRAWN_AT = 256


@functools.lru_cache(maxsize=4096)
def sprite(code_point: int, side: int) -> NDArray[np.float32]:
    """A thing's picture, premultiplied by its opacity: (side, side, 4) in [0, 1]. Pixels are means of areas, as those of a larger one are."""
    drawn = render(code_point, _DRAWN_AT).convert("RGBa").resize((side, side), Image.Resampling.BOX)
    return np.asarray(drawn, np.float32) / np.float32(255)


def shade_mask(texture: str, phase: tuple[int, int], side: int = UNITS) -> NDArray[np.bool_]:
    """Where a ground is of its darker shade: (side, side).

    Args:
        texture: one of :data:`TEXTURES`.
        phase: of rows and columns, units in [0, PERIOD).
        side: of the picture, in pixels.
    """
    at = (np.arange(side) + 0.5) * (UNITS / side)
    y, x = (at + phase[0]) % PERIOD, (at + phase[1]) % PERIOD
    half = PERIOD / 2
    if texture == "striped":
        return np.broadcast_to(x[None] < half, (side, side))
    if texture == "dotted":
        return (y[:, None] - half) ** 2 + (x[None] - half) ** 2 < 2.2**2
    if texture == "checked":
        return (y[:, None] < half) ^ (x[None] < half)
    return np.zeros((side, side), bool)


@dataclass(frozen=True, slots=True)
class Drawing:
    """All that a row's picture is made of.

    Attributes:
        things: code point, width, row and column of the upper left corner of each, in units.
        colour: of the ground, sRGB.
        texture: one of :data:`TEXTURES`.
        phase: of the texture.
    """

    things: tuple[tuple[int, int, int, int], ...]
    colour: tuple[int, int, int]
    texture: str
    phase: tuple[int, int]

    @classmethod
    def draw(
        cls,
        g: np.random.Generator,
        codes: Sequence[int],
        sizes: NDArray[np.int64],
        places: NDArray[np.int64],
        colour: tuple[int, int, int],
        texture: str,
    ) -> Drawing:
        """Draw what a scene leaves open: where in its quarter each thing lies, the tone of the ground, the texture's phase.

        Args:
            g: the row's generator.
            codes: code points of n things.
            sizes: (n,) indices into :data:`WIDTHS`.
            places: (n,) quarters, row by row.
            colour: of the ground.
            texture: of the ground.
        """
        things = []
        for code, size, place in zip(codes, sizes.tolist(), places.tolist(), strict=True):
            top, left = g.integers(QUARTER - WIDTHS[size] + 1, size=2).tolist()
            things.append((code, WIDTHS[size], QUARTER * (place // 2) + top, QUARTER * (place % 2) + left))
        red, green, blue = (min(255, max(0, c + d)) for c, d in zip(colour, g.integers(-TONE, TONE + 1, size=3).tolist(), strict=True))
        phase = g.integers(PERIOD, size=2).tolist()
        return cls(tuple(things), (red, green, blue), texture, (phase[0], phase[1]))

    def pixels(self, side: int) -> NDArray[np.uint8]:
        """The picture, (side, side, 3)."""
        light = np.array(self.colour, np.float32) / 255
        canvas = np.where(_mask(self.texture, self.phase, side), np.float32(SHADE), np.float32(1))[..., None] * light
        scale = side / UNITS
        for code, width, top, left in self.things:
            # Rounded outwards in no case: a thing stays in its quarter.
            y, x, size = int(top * scale), int(left * scale), int(width * scale)
            own = sprite(code, size)
            here = canvas[y : y + size, x : x + size]
            here *= 1 - own[..., 3:]
            here += own[..., :3]
        return np.asarray(np.clip(np.rint(canvas * 255), 0, 255), np.uint8)


@functools.lru_cache(maxsize=1024)
def _mask(texture: str, phase: tuple[int, int], side: int) -> NDArray[np.bool_]:
    return shade_mask(texture, phase, side)
