"""How much memory there is beside the GPUs, within the limit of the container or service that this process is in. Imports nothing heavy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

CGROUP, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where control groups are mounted, and which are this process's."""
FILES = {False: ("memory.max", "memory.current", ""), True: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")}
"""A group's limit, its use, and what the names in its ``memory.stat`` begin with; of version 2, and of version 1."""


def memory() -> tuple[int, int]:
    """Bytes that this process could have at most, and those of them that are free: the least that the machine and any group around it say."""
    machine = psutil.virtual_memory()
    total, free = int(machine.total), int(machine.available)
    for group, old in _groups():
        limit_file, used_file, prefix = FILES[old]
        with contextlib.suppress(OSError, ValueError):  # no such group here, or one without a limit ("max")
            limit, used = (int((group / name).read_text()) for name in (limit_file, used_file))
            told = dict(line.partition(" ")[::2] for line in (group / "memory.stat").read_text().splitlines())
            # The cache of files gives way. Not so files in /dev/shm, which "file" and "cache" count, and these do not.
            cached = sum(int(told.get(f"{prefix}{name}", 0)) for name in ("active_file", "inactive_file"))
            total, free = min(total, limit), min(free, max(0, limit - used + cached))
    return total, free


def _groups() -> Iterator[tuple[Path, bool]]:
    """The folders of this process's groups and of those around them, and whether they are of version 1. A container may see its own as the root."""
    try:
        lines = OWN.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        old = kinds != ""
        if old and "memory" not in kinds.split(","):
            continue
        own = PurePosixPath(path.lstrip("/"))
        for one in dict.fromkeys((own, *own.parents, PurePosixPath())):
            yield CGROUP / "memory" / one if old else CGROUP / one, old
