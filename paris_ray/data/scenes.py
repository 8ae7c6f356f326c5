"""Scenes: a corpus too large to be learnt by heart, composed of OpenMoji pictures, with combinations that training never sees.

A scene has one to three different things, each in a quarter of the picture, on a coloured ground; its caption says all that can be scored. A row is a
function of (seed, what may vary, part, index), so that any part can be made anywhere. The part ``seen`` is for training. Each row of the part
``unseen`` has a combination that no row of ``seen`` has, though every thing, place, colour and size of it occurs there in others:

========= ==================================== ===================================================================================
kind      combination                          what is never seen together
========= ==================================== ===================================================================================
place     a thing at a place                   one place of each thing
ground    a thing on a ground of a colour      one colour of each thing
pair      two things in one scene              every thing with about an eighth of the others
========= ==================================== ===================================================================================

Fewer colours, textures, sizes or things make it easier (:class:`paris_ray.config.ScenesSource`); what is held out follows from those in use.
A row of ``unseen`` has combinations of one kind only; the kinds take turns. Textures, sizes and where in its quarter a thing lies are never held out.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from paris_ray import rng
from paris_ray.config import ConfigError, ScenesSource
from paris_ray.data import scene_pictures
from paris_ray.data.openmoji import GROUNDS
from paris_ray.data.scene_pictures import TEXTURES, Drawing
from paris_ray.data.sources.base import Item, Sample, Unit

Part = Literal["seen", "unseen"]

PLACES = ("top left", "top right", "bottom left", "bottom right")
SIZES = ("large", "small")
"""Captions name the small ones only."""
COLOURS = tuple(GROUNDS)
MOST_THINGS = 3

UNSEEN = ("place", "ground", "pair")
"""Kinds of combination that the rows of ``unseen`` have, in turn."""

PAIRS_OF = 8
"""Of so many things that a thing could share a scene with, one is held out."""

# Told apart at ten pixels: of 151 that are one thing each, those nearest to another one are left out.
_OBJECTS = """
fox 1F98A, lion 1F981, panda 1F43C, frog 1F438, pig 1F437, cow 1F42E, tiger 1F42F, penguin 1F427, owl 1F989, rooster 1F413, duck 1F986,
parrot 1F99C, butterfly 1F98B, octopus 1F419, crab 1F980, whale 1F40B, unicorn 1F984, seal 1F9AD, rose 1F339, sunflower 1F33B, cactus 1F335,
mushroom 1F344, maple leaf 1F341, pear 1F350, tangerine 1F34A, lemon 1F34B, slice of watermelon 1F349, strawberry 1F353, peach 1F351,
coconut 1F965, kiwi 1F95D, tomato 1F345, aubergine 1F346, avocado 1F951, garlic 1F9C4, croissant 1F950, pretzel 1F968, hamburger 1F354,
doughnut 1F369, cupcake 1F9C1, birthday cake 1F382, lollipop 1F36D, beer mug 1F37A, wine glass 1F377, rocket 1F680, bus 1F68C, taxi 1F695,
fire engine 1F692, tractor 1F69C, locomotive 1F682, parachute 1FA82, present 1F381, teddy bear 1F9F8, crown 1F451, top hat 1F3A9, trophy 1F3C6,
guitar 1F3B8, light bulb 1F4A1, key 1F511, padlock 1F512, camera 1F4F7, television 1F4FA, book 1F4D5, gem 1F48E, money bag 1F4B0, pill 1F48A,
bomb 1F4A3, droplet 1F4A7, moon 1F319, sun 1F31E, volcano 1F30B, house 1F3E0, castle 1F3F0, skull 1F480, ghost 1F47B, pumpkin 1F383,
billiard ball 1F3B1, dress 1F457, scarf 1F9E3, shoe 1F460, bucket 1FAA3, toolbox 1F9F0, rock 1FAA8, die 1F3B2, lifebuoy 1F6DF,
fire extinguisher 1F9EF, postbox 1F4EE, ice cube 1F9CA, egg 1F95A, sandwich 1F96A, honey pot 1F36F, bell pepper 1FAD1, mouse 1F42D, monkey 1F435,
basket 1F9FA, candy 1F36C, chocolate bar 1F36B, joystick 1F579, palette 1F3A8, floppy disk 1F4BE, package 1F4E6, briefcase 1F4BC, purse 1F45B,
shield 1F6E1, compass 1F9ED, brain 1F9E0, cabbage 1F96C, soft drink 1F9C3, snail 1F40C, scroll 1F4DC, wolf 1F43A, rabbit 1F430
"""


def vocabulary(objects: int | None = None) -> dict[str, int]:
    """Names of things and their code points, in the order of a hash of the name.

    Args:
        objects: so many of them; ``None``: all.

    Raises:
        ConfigError: there are not so many.
    """
    pairs = [entry.strip().rpartition(" ") for entry in _OBJECTS.split(",")]
    order = sorted(((name, int(code, 16)) for name, _, code in pairs), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    if objects is not None and objects > len(order):
        raise ConfigError(f"data.source.objects is {objects}; there are {len(order)}: give at most that, or null for all")
    return dict(order[:objects])


# -- what a scene is, and its caption -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Thing:
    """One thing of a scene: its name, one of :data:`SIZES`, one of :data:`PLACES`."""

    name: str
    size: str
    place: str


@dataclass(frozen=True, slots=True)
class Scene:
    """What a caption says: things in the order in which it names them, and the ground's colour and texture."""

    things: tuple[Thing, ...]
    colour: str
    texture: str

    @property
    def caption(self) -> str:
        """``a fox at the top left and a small owl at the bottom right on a striped blue ground``."""
        said = [f"{_a(f'small {one.name}' if one.size == 'small' else one.name)} at the {one.place}" for one in self.things]
        ground = _a(self.colour if self.texture == "plain" else f"{self.texture} {self.colour}")
        return f"{' and '.join([', '.join(said[:-1]), said[-1]] if said[1:] else said)} on {ground} ground"

    @classmethod
    def parse(cls, caption: str) -> Scene:
        """The scene that a caption says, whatever its things are called.

        Raises:
            ValueError: it says none.
        """
        whole = _CAPTION.fullmatch(caption)
        things = [_THING.fullmatch(piece) for piece in re.split(r", | and (?=an? )", whole["things"])] if whole else []
        if whole is None or not all(things):
            raise ValueError(
                f"caption: {caption!r} is not of the form 'a NAME at the {PLACES[0]} and a small NAME at the … on a striped blue ground'"
            )
        found = (Thing(one["name"], "small" if one["small"] else "large", one["place"]) for one in things if one)
        return cls(tuple(found), whole["colour"], whole["texture"] or "plain")


_CAPTION = re.compile(rf"(?P<things>.+) on an? (?:(?P<texture>{'|'.join(TEXTURES[1:])}) )?(?P<colour>{'|'.join(COLOURS)}) ground")
_THING = re.compile(rf"an? (?P<small>small )?(?P<name>.+) at the (?P<place>{'|'.join(PLACES)})")


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"  # of the names with u none begins with a vowel


# -- what is held out ---------------------------------------------------------------------------------------------------


class HoldOut:
    """Which combinations the part ``seen`` never has.

    Args:
        seed: of the source.
        names: the things in use, in order.
        colours: the grounds' colours in use.

    Attributes:
        places: (V,) index of each thing's unseen place; every place is that of as many things as every other, or one more.
        colours: (V,) index in :data:`COLOURS` of each thing's unseen colour of the ground, balanced in the same way.
        pairs: (V, V) bool, whether two things never share a scene; symmetric.
    """

    def __init__(self, seed: int, names: Sequence[str], colours: Sequence[str] = COLOURS):
        self.names = list(names)
        used = np.array([COLOURS.index(colour) for colour in colours])
        ranks = [rng.permutation(seed, f"scenes-{kind}", 0, len(self.names)) for kind in UNSEEN]
        self.places, self.colours = ranks[0] % len(PLACES), used[ranks[1] % len(used)]
        self.pairs = (ranks[2][:, None] + ranks[2][None]) % PAIRS_OF == 0
        np.fill_diagonal(self.pairs, False)

    def kinds(self, things: NDArray[np.int64], places: NDArray[np.int64], colours: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which kinds of unseen combination scenes have.

        Args:
            things: (B, n) indices into the names.
            places: (B, n) indices into :data:`PLACES`.
            colours: (B,) indices into :data:`COLOURS`.

        Returns:
            (B, 3), in the order of :data:`UNSEEN`.
        """
        place = (self.places[things] == places).any(1)
        ground = (self.colours[things] == colours[:, None]).any(1)
        pair = self.pairs[things[:, :, None], things[:, None, :]].any((1, 2))
        return np.stack([place, ground, pair], 1)

    def unseen(self, scene: Scene) -> list[str]:
        """Kinds of unseen combination that a scene has; none for a scene that training may see. Raises ValueError for a thing it does not know."""
        things = np.array([[self.names.index(one.name) for one in scene.things]])
        places = np.array([[PLACES.index(one.place) for one in scene.things]])
        found = self.kinds(things, places, np.array([COLOURS.index(scene.colour)]))[0]
        return [kind for kind, has in zip(UNSEEN, found, strict=True) if has]

    def asked(self, scene: Scene) -> str:
        """The combinations of a scene that are unseen, as words: scenes with the same ones ask the same thing."""
        index = {one.name: self.names.index(one.name) for one in scene.things}
        found = [f"{one.name} at {one.place}" for one in scene.things if PLACES[self.places[index[one.name]]] == one.place]
        found += [f"{one.name} on {scene.colour}" for one in scene.things if COLOURS[self.colours[index[one.name]]] == scene.colour]
        found += [f"{a} with {b}" for a, b in itertools.combinations(sorted(index), 2) if self.pairs[index[a], index[b]]]
        return ", ".join(sorted(found))


# -- the source ---------------------------------------------------------------------------------------------------------

_CANDIDATES = 32


class Scenes:
    """Scenes by index.

    Args:
        source: how many rows of each part, how many objects, the seed.
        image_size: side of the pictures in pixels, at least 32; they are drawn at this size.

    Raises:
        ConfigError: more objects than there are, colours that do not exist or are too few, or pictures too small.
    """

    def __init__(self, source: ScenesSource, image_size: int):
        if image_size < scene_pictures.UNITS:
            raise ConfigError(f"data.image_size is {image_size}; scenes are told apart from {scene_pictures.UNITS} pixels up")
        self.rows: dict[Part, int] = {"seen": source.seen, "unseen": source.unseen}
        self.seed, self.side, self.codes = source.seed, image_size, vocabulary(source.objects)
        self.names = list(self.codes)
        self.most = source.things or MOST_THINGS
        self.colours, self.textures = source.colours or COLOURS, source.textures or TEXTURES
        self._sizes = np.array([SIZES.index(size) for size in source.sizes or SIZES])
        if len({*self.colours} & {*COLOURS}) != len(self.colours) or len(self.colours) <= self.most:
            raise ConfigError(
                f"data.source.colours is {list(self.colours)}; name more than {self.most} (things in a scene, each of which has a colour that it is "
                f"never seen on) of {', '.join(COLOURS)}, each once"
            )
        self._colours = np.array([COLOURS.index(colour) for colour in self.colours])
        limited = {key: value for key in ("things", "sizes", "colours", "textures") if (value := getattr(source, key))}
        limits = [f"{key}-{'-'.join(map(str, np.atleast_1d(value)))}" for key, value in limited.items()]
        self.kind = "-".join([str(len(self.names)), *limits])
        self.hold_out = HoldOut(source.seed, self.names, self.colours)

    # -- rows by index ----------------------------------------------------------------------------------------------------

    def _draw(self, part: Part, index: int) -> tuple[Scene, Drawing]:
        """One row: a pure function of (seed, objects and what may vary, part, index)."""
        g = rng.generator(self.seed, f"scenes-{part}-{self.kind}", index)
        wanted = np.zeros(len(UNSEEN), bool)
        if part == "unseen":
            wanted[index % len(UNSEEN)] = True
        fewest = 2 if wanted[UNSEEN.index("pair")] else 1
        n = int(g.integers(fewest, self.most + 1))
        while True:  # the number of things is drawn first, so that scenes of many things are not rarer for what is refused
            things = g.integers(len(self.names), size=(_CANDIDATES, n))
            distinct = (things[:, :, None] == things[:, None]).sum((1, 2)) == n
            places = g.random((_CANDIDATES, len(PLACES))).argsort(1)[:, :n]
            colours = self._colours[g.integers(len(self._colours), size=_CANDIDATES)]
            right = np.flatnonzero(distinct & (self.hold_out.kinds(things, places, colours) == wanted).all(1))
            if len(right):
                break
        thing, place, colour = things[right[0]], places[right[0]], int(colours[right[0]])
        sizes = self._sizes[g.integers(len(self._sizes), size=n)]
        texture = self.textures[int(g.integers(len(self.textures)))]
        scene = Scene(tuple(Thing(self.names[t], SIZES[s], PLACES[p]) for t, s, p in zip(thing, sizes, place, strict=True)), COLOURS[colour], texture)
        return scene, Drawing.draw(g, [self.codes[one.name] for one in scene.things], sizes, place, GROUNDS[scene.colour], scene.texture)

    def scene(self, part: Part, index: int) -> Scene:
        """What a row shows."""
        return self._draw(part, index)[0]

    def picture(self, part: Part, index: int) -> NDArray[np.uint8]:
        """A row's picture, (S, S, 3)."""
        return self._draw(part, index)[1].pixels(self.side)

    def labels(self, part: Part, indices: Sequence[int]) -> pa.Table:
        """What rows show, as a table.

        Columns: ``index``, ``part``, ``unseen`` (kinds), ``caption``, ``colour``, ``texture``; lists in the caption's order: ``objects``, ``sizes``,
        ``places``.
        """
        scenes = [self.scene(part, index) for index in indices]
        names = pa.list_(pa.string())
        columns: dict[str, Any] = {
            "index": pa.array(indices, pa.int64()),
            "part": pa.array([part] * len(scenes), pa.string()),
            "unseen": pa.array([self.hold_out.unseen(scene) for scene in scenes], names),
            "caption": pa.array([scene.caption for scene in scenes], pa.string()),
            "objects": pa.array([[one.name for one in scene.things] for scene in scenes], names),
            "sizes": pa.array([[one.size for one in scene.things] for scene in scenes], names),
            "places": pa.array([[one.place for one in scene.things] for scene in scenes], names),
            "colour": pa.array([scene.colour for scene in scenes], pa.string()),
            "texture": pa.array([scene.texture for scene in scenes], pa.string()),
        }
        return pa.table(columns)

    # -- as a source ------------------------------------------------------------------------------------------------------

    def units(self, rows: int) -> list[Unit]:
        """Runs of rows, first of ``seen``, then of ``unseen``."""
        pieces = [(part, start, min(start + rows, count)) for part, count in self.rows.items() for start in range(0, count, rows)]
        return [
            Unit(number, (self.seed, self.kind, part, start, stop), stop - start, f"{part} {start} … {stop - 1}")
            for number, (part, start, stop) in enumerate(pieces)
        ]

    def read(self, unit: Unit) -> Iterator[Item]:
        """The rows of a unit; nothing is drawn yet."""
        _, _, part, start, stop = unit.where
        for index in range(start, stop):
            yield Item(f"scenes/{self.seed}/{self.kind}/{part}/{index}", f"{part}/{index}")

    def load(self, item: Item) -> Sample:
        """Draw one row."""
        assert isinstance(item.image, str)
        part, index = item.image.split("/")
        scene, drawing = self._draw("unseen" if part == "unseen" else "seen", int(index))
        group = " + ".join(sorted(one.name for one in scene.things))
        return Sample(Image.fromarray(drawing.pixels(self.side)), scene.caption, item.source, group=group, held_out=part == "unseen")
