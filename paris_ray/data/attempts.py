"""How often a unit of the source has been begun: Ray starts a worker that died again, without end, and what kills it must be named. No Ray here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from paris_ray.data.sources.base import Unit
from paris_ray.storage import Folder

ATTEMPTS = 5
"""Workers that may die on a unit: nodes come and go, and a worker may die of its neighbours' memory."""

_NAME = "_attempts-{:05d}.json"


class UnitError(RuntimeError):
    """A unit of the source kills every worker that reads it."""


@contextlib.contextmanager
def attempt(folder: Folder, unit: Unit) -> Iterator[None]:
    """In a worker: while it works on a unit, a small file in ``folder`` says how often that was begun. Where the worker dies, the file stays.

    Raises:
        UnitError: :data:`ATTEMPTS` workers have died on it.
    """
    name = _NAME.format(unit.number)
    before = int(folder.read_json(name)) if folder.exists(name) else 0
    if before >= ATTEMPTS:
        raise _error(unit, before)
    folder.write_json(name, before + 1)
    try:
        yield
    finally:
        folder.delete(name)


@contextlib.contextmanager
def counted(folder: Folder, units: Sequence[Unit]) -> Iterator[None]:
    """In the driver: while workers work on these units. Counts anew.

    Raises:
        UnitError: instead of what Ray says of the worker that refused the unit.
    """
    names = {_NAME.format(unit.number): unit for unit in units}

    def found() -> list[str]:
        return [entry.name for entry in folder.files() if entry.name in names]

    for name in found():
        folder.delete(name)
    try:
        yield
    except Exception:
        for name in found():
            if (times := int(folder.read_json(name))) >= ATTEMPTS:
                raise _error(names[name], times) from None
        raise


def _error(unit: Unit, times: int) -> UnitError:
    return UnitError(
        f"data.source: {times} workers have died on part {unit.number} ({unit.what!r}): of memory, or of a decoder that crashed on a file of it. "
        "Give workers more memory (fewer of them on a node: --set data.encoder_cpus=…), or take the file out of the source and pass --rebuild embed"
    )
