"""How often a piece of work has been begun: Ray starts a worker that died again, without end, and what kills it must be named. No Ray here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from paris_ray.data.sources.base import Unit
from paris_ray.storage import Folder

ATTEMPTS = 5
"""Workers that may die on a piece of work: nodes come and go, and a worker may die of its neighbours' memory."""
ALONE = 2
"""After so many deaths a unit is read one row at a time, each noted before it is read. A row on which two workers die so is refused."""

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
            "of memory, or of a decoder that crashed on more than one row of it (one that kills its workers alone is refused). Have fewer workers, "
            "--set data.max_encoders=…, or larger nodes: the same command keeps what is made. Else take the file out of the source, and make the "
            "corpus anew, with --rebuild embed or in another run_dir"
        )
        return cls(unit.number, f"data.source, part {unit.number} ({unit.what!r})", remedy)

    def error(self, times: int) -> WorkError:
        """That so many workers have died on it."""
        return WorkError(f"{self.what}: {times} workers have died on it, {self.remedy}")


class Begun:
    """A piece of work in a worker's hands.

    Args:
        folder: where its file is.
        name: of the file.
        state: what is in it: how many workers have begun, the row that one of them reads alone, the row on which one died so, rows that are refused.
    """

    def __init__(self, folder: Folder, name: str, state: dict[str, Any]):
        self._folder, self._name, self._state = folder, name, state
        self.alone = state["times"] > ALONE
        self.refused = frozenset(state["refused"])

    @contextlib.contextmanager
    def reading(self, row: int) -> Iterator[None]:
        """While this row, and no other, is read; where the worker dies, the file names it."""
        self._folder.write_json(self._name, {**self._state, "row": row})
        yield
        self._folder.write_json(self._name, self._state)


@contextlib.contextmanager
def attempt(folder: Folder, work: Work) -> Iterator[Begun]:
    """In a worker: while it is at a piece of work, a small file in ``folder`` says how often that was begun. Where the worker dies, the file stays.

    Raises:
        WorkError: :data:`ATTEMPTS` workers have died on it.
    """
    name = _NAME.format(work.number)
    state = folder.read_json(name) if folder.exists(name) else {"times": 0, "row": None, "suspect": None, "refused": []}
    if (row := state["row"]) is not None:
        if row == state["suspect"]:  # then it is known, and what else kills is looked for anew
            state = {**state, "times": ALONE, "refused": [*state["refused"], row]}
        state = {**state, "row": None, "suspect": row}
    if state["times"] >= ATTEMPTS:
        raise work.error(state["times"])
    state["times"] += 1
    folder.write_json(name, state)
    try:
        yield Begun(folder, name, state)
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
            with contextlib.suppress(FileNotFoundError):  # of another worker, which has just ended it
                if (times := folder.read_json(name)["times"]) >= ATTEMPTS:
                    raise names[name].error(times) from None
        raise
