"""What a source is: units that are listed cheaply, items that are read in a worker, samples that are ready to decode."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of a source that one worker reads: the unit of work and of resumption, one file of the corpus.

    Args:
        number: of the part that it becomes.
        where: what :meth:`Source.read` needs to find it; small, made of numbers, strings, bytes and tuples.
        rows: how many items it has; ``None`` where only reading tells.
        what: names it to people.
    """

    number: int
    where: Any
    rows: int | None = None
    what: str = ""


@dataclass(frozen=True, slots=True)
class Item:
    """One row as a source lists it. Whatever is wrong with it costs this row and no other.

    Args:
        source: unique name, as shown in the corpus and among the rejects.
        image: content of an image file, or the name by which :meth:`Source.load` finds it.
        caption: as found, which may be anything.
        key: what identifies the row, where the source is told that it has that; as found.
        score: as found.
        reason: why the row is refused already.
    """

    source: str
    image: bytes | str | None = None
    caption: Any = None
    key: str | None = None
    score: Any = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One row, read, not yet checked.

    Args:
        image: content of an image file, or a picture that the source has drawn.
        caption: as found.
        content: what identifies the image: a hash of its bytes, or the name of a drawn one.
        key: what identifies the row, instead of image and caption.
        group: rows that the source says belong together; ``None``: those that look alike.
        score: as found.
        held_out: whether the source holds the row out, where it says so of all its rows; ``None``: that is drawn.
    """

    image: bytes | Image.Image
    caption: Any
    content: str
    key: str | None = None
    group: str | None = None
    score: Any = None
    held_out: bool | None = None


class Source(Protocol):
    """Where rows come from. :meth:`units` runs in the driver; a worker reads a unit's items in order and loads them in threads."""

    def units(self, rows: int) -> list[Unit]:
        """The whole source in units of about ``rows`` rows, in an order that depends on nothing but the source. No image is read.

        Raises:
            ConfigError: there is nothing that could be read.
        """
        ...

    def read(self, unit: Unit) -> Iterator[Item]:
        """The items of a unit, one after another. Raises OSError when the store fails, which is no property of a row."""
        ...

    def load(self, item: Item) -> Sample:
        """Fetch what an item without a reason still lacks. Raises RejectError with the reason; OSError when the store fails."""
        ...


def content_hash(data: bytes) -> str:
    """What identifies the content of a file: 32 hex digits."""
    return hashlib.sha256(data).hexdigest()[:32]


def listing(units: list[Unit]) -> dict[str, Any]:
    """What was listed, in three figures: if they change, parts made before and after do not belong together."""
    digest = hashlib.sha256()
    for unit in units:
        digest.update(repr((unit.number, unit.where, unit.rows)).encode("utf-8", "surrogateescape"))
    known = [unit.rows for unit in units if unit.rows is not None]
    return {"units": len(units), "rows": sum(known) if len(known) == len(units) else None, "fingerprint": digest.hexdigest()[:32]}
