"""Memory within a container's limit. The figures of the groups are made up as the kernel's documents say them."""

from __future__ import annotations

import psutil
import pytest

from paris_ray import host_memory

MIB = 1 << 20
# Of 600 MiB of files 200 are the object store's, in /dev/shm: they stay. The other 400 are a cache.
STAT = f"anon {100 * MIB}\nfile {600 * MIB}\nshmem {200 * MIB}\nactive_file {300 * MIB}\ninactive_file {100 * MIB}"
OLD_STAT = f"cache {600 * MIB}\nactive_file 1\ninactive_file 1\ntotal_active_file {300 * MIB}\ntotal_inactive_file {100 * MIB}"


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Writes which groups a process is in, and their files."""
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    monkeypatch.setattr(host_memory, "OWN", tmp_path / "own")

    def write(own, files):
        for name, text in {"own": own, **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")

    return write


def test_a_container_has_the_last_word(groups):
    groups("0::/", {"memory.max": 1000 * MIB, "memory.current": 700 * MIB, "memory.stat": STAT})
    assert host_memory.memory() == (1000 * MIB, 700 * MIB)
    groups("0::/", {"memory.max": "max"})
    machine = psutil.virtual_memory()
    total, free = host_memory.memory()
    assert total == machine.total
    assert free > 0.5 * machine.available


def test_a_container_of_the_first_version(groups):
    own = "9:pids:/x\n4:cpu,memory:/docker/abc\n0::/"  # it sees its own group as the root
    usage = {"memory/memory.usage_in_bytes": 700 * MIB, "memory/memory.stat": OLD_STAT}
    groups(own, {"memory/memory.limit_in_bytes": 1000 * MIB, **usage})
    assert host_memory.memory() == (1000 * MIB, 700 * MIB)
    groups(own, {"memory/memory.limit_in_bytes": (1 << 63) - 4096})  # none
    assert host_memory.memory()[0] == psutil.virtual_memory().total


def test_a_limit_around_the_own_group_counts(groups):
    own = {"a.slice/job/memory.max": "max", "a.slice/job/memory.current": 50 * MIB}
    groups("0::/a.slice/job", {**own, "a.slice/memory.max": 300 * MIB, "a.slice/memory.current": 290 * MIB, "a.slice/memory.stat": "anon 1"})
    assert host_memory.memory() == (300 * MIB, 10 * MIB)


def test_a_machine_without_groups(groups, tmp_path):
    groups("", {})
    (tmp_path / "own").unlink()
    assert host_memory.memory()[0] == psutil.virtual_memory().total
