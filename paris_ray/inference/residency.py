"""Which experts stay in memory: loaded on first use, the least recently used one making room for the next."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from paris_ray.diffusion.path import Objective
from paris_ray.models import DiT

Loaded = tuple[DiT, Objective]

HEADROOM = 1.5
"""An expert is loaded beside others when this many times its size is free: itself, what its conversion takes for a moment, and activations."""

CGROUP = Path("/sys/fs/cgroup")


class Residents:
    """Experts in memory, least recently used out first. Not thread-safe; its owner locks.

    Args:
        load: gives expert k.
        device: whose memory counts.
        limit: experts at once; ``None`` is as many as memory allows, and at least one.
        free: bytes of memory that are free on the device; for tests.
    """

    def __init__(
        self,
        load: Callable[[int], Loaded],
        device: torch.device,
        limit: int | None = None,
        free: Callable[[torch.device], int] | None = None,
    ):
        if limit is not None and (isinstance(limit, bool) or limit < 1):
            raise ValueError(f"max_resident: {limit!r} must be at least 1, or None for as many as memory allows")
        self._load, self.device, self.limit, self._free = load, device, limit, free or free_memory
        self._experts: OrderedDict[int, Loaded] = OrderedDict()
        self._largest = 0
        self.loads = 0

    def __contains__(self, k: int) -> bool:
        return k in self._experts

    def __len__(self) -> int:
        return len(self._experts)

    def get(self, k: int) -> Loaded:
        """Expert k, loaded if need be. Raises what loading raises."""
        if k not in self._experts:
            # Room first, so that two are never in memory together where only one fits.
            while self._experts and (len(self._experts) >= self.limit if self.limit is not None else self._short()):
                self._experts.popitem(last=False)
            self.put(k, self._load(k))
        self._experts.move_to_end(k)
        return self._experts[k]

    def put(self, k: int, loaded: Loaded) -> None:
        """Keep expert k, in the place of an older one of that number if there is one."""
        self._experts[k] = loaded
        self._experts.move_to_end(k)
        self.loads += 1
        self._largest = max(self._largest, size(loaded[0]))
        while self.limit is not None and len(self._experts) > self.limit:
            self._experts.popitem(last=False)

    def drop(self, k: int) -> None:
        """Forget expert k."""
        self._experts.pop(k, None)

    def _short(self) -> bool:
        return self._free(self.device) < HEADROOM * self._largest


def size(module: nn.Module) -> int:
    """Bytes of a module's weights."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device; on a CPU within the limit of the container, if there is one."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch keeps for itself after a tensor has gone is free as well.
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit ("max")
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(cached.get("file", 0)))
    return free
