"""How often a piece of work has been begun: Ray starts a worker that died again, without end, and what kills it must be named. No Ray here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from paris_ray.data.sources.base import Unit
from paris_ray.storage import Folder

ATTEMPTS = 5
"""Workers that may die on a piece of work: nodes come and go, and a worker may die of its neighbours' memory."""

_NAME = "_attempts-{:05d}.json"


class WorkError(RuntimeError):
    """A piece of work kills every worker that takes it."""


@dataclass(frozen=True)
class Work:
    """A piece of work.

    Attributes:
        number: its own among those that share a folder.
        what: its name in the error.
        remedy: what may kill a worker there, and what to do.
    """

    number: int
    what: str
    remedy: str

    @classmethod
    def of(cls, unit: Unit) -> Work:
        """Reading a unit of the source."""
        remedy = (
            "of memory, or of a decoder that crashed on a file of it. Give workers more memory (fewer of them on a node: --set data.encoder_cpus=…), "
            "or take the file out of the source and pass --rebuild embed"
        )
        return cls(unit.number, f"data.source, part {unit.number} ({unit.what!r})", remedy)

    def error(self, times: int) -> WorkError:
        """That so many workers have died on it."""
        return WorkError(f"{self.what}: {times} workers have died on it, {self.remedy}")


@contextlib.contextmanager
def attempt(folder: Folder, work: Work) -> Iterator[None]:
    """In a worker: while it is at a piece of work, a small file in ``folder`` says how often that was begun. Where the worker dies, the file stays.

    Raises:
        WorkError: :data:`ATTEMPTS` workers have died on it.
    """
    name = _NAME.format(work.number)
    before = int(folder.read_json(name)) if folder.exists(name) else 0
    if before >= ATTEMPTS:
        raise work.error(before)
    folder.write_json(name, before + 1)
    try:
        yield
    finally:
        folder.delete(name)


@contextlib.contextmanager
def counted(folder: Folder, works: Sequence[Work]) -> Iterator[None]:
    """In the driver: while workers are at these. Counts anew.

    Raises:
        WorkError: instead of what Ray says of the worker that refused one.
    """
    names = {_NAME.format(work.number): work for work in works}

    def found() -> list[str]:
        return [entry.name for entry in folder.files() if entry.name in names]

    for name in found():
        folder.delete(name)
    try:
        yield
    except Exception:
        for name in found():
            if (times := int(folder.read_json(name))) >= ATTEMPTS:
                raise names[name].error(times) from None
        raise
