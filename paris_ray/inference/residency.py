"""Which experts stay in memory: loaded on first use, the least recently used one making room for the next."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from paris_ray.diffusion.path import Objective
from paris_ray.host_memory import memory
from paris_ray.models import DiT

Loaded = tuple[DiT, Objective]
T = TypeVar("T")

HEADROOM = 1.5
"""An expert comes beside others when this many times its size is free: itself, and activations. It comes in its final precision, tensor by tensor, so
that coming takes no more than its size."""


class Residents:
    """Experts in memory, least recently used out first. Not thread-safe; its owner locks.

    Beside a GPU there are three places: the device; host memory, pinned, where an expert that had to go waits in its final precision, if half of what
    is free is left; and its file. On a CPU device and host are one memory: there an expert that has to go is dropped, so that ``limit`` bounds
    memory, and read from its file again.

    Args:
        load: gives expert k in CPU memory, in its final precision.
        device: whose memory counts.
        limit: experts at once; ``None`` is as many as memory allows, and at least one.
        free: bytes of memory that are free on a device; for tests.
        compile: compile the blocks of each expert when it comes.
    """

    def __init__(
        self,
        load: Callable[[int], Loaded],
        device: torch.device,
        limit: int | None = None,
        free: Callable[[torch.device], int] | None = None,
        compile: bool = False,
    ):
        if limit is not None and (isinstance(limit, bool) or limit < 1):
            raise ValueError(f"max_resident: {limit!r} must be at least 1, or None for as many as memory allows")
        self._load, self.device, self.limit, self._free, self._compile = load, device, limit, free or free_memory, compile
        self._experts: OrderedDict[int, Loaded] = OrderedDict()
        self._waiting: dict[int, Loaded] = {}  # in host memory, beside a GPU
        self._sizes: dict[int, int] = {}
        self.loads = 0

    def __contains__(self, k: int) -> bool:
        return k in self._experts

    def __len__(self) -> int:
        return len(self._experts)

    def get(self, k: int) -> Loaded:
        """Expert k, loaded if need be. Raises what loading raises."""
        if k not in self._experts:
            if self.device.type == "cpu":
                self._make_room(k)  # first, so that two are never in memory together where only one fits
            if k in self._waiting:
                loaded = self._waiting[k]
            else:
                loaded = self.retried(lambda: self._load(k))
                self.loads += 1
            self._sizes[k] = size(loaded[0])
            if self.device.type != "cpu":
                self._make_room(k)  # of the first one too, its size is known before it comes
            self._place(k, loaded)
        self._experts.move_to_end(k)
        return self._experts[k]

    def put(self, k: int, loaded: Loaded) -> None:
        """Keep expert k, in CPU memory until now, in the place of an older one of that number if there is one."""
        self.drop(k)
        self.loads += 1
        self._sizes[k] = size(loaded[0])
        self._make_room(k)
        self._place(k, loaded)

    def drop(self, k: int) -> None:
        """Forget expert k."""
        self._experts.pop(k, None)
        self._waiting.pop(k, None)
        self._sizes.pop(k, None)

    def retried(self, work: Callable[[], T], keep: int | None = None) -> T:
        """``work()``; if memory is short for it, once more without the least recently used expert other than ``keep``."""
        try:
            return work()
        except torch.OutOfMemoryError:
            others = [k for k in self._experts if k != keep]
            if not others:
                raise
        # Outside of the handler, whose error holds on to what the first attempt had in memory.
        self._evict(others[0])
        return work()

    def _place(self, k: int, loaded: Loaded) -> None:
        module, objective = loaded
        if self.device.type != "cpu":
            module = self.retried(lambda: moved(module, lambda tensor: tensor.to(self.device, non_blocking=True)))
        if self._compile:
            module.compile_blocks()  # now: a copy of a compiled module is not compiled
        self._experts[k] = module, objective

    def _make_room(self, k: int) -> None:
        # Of one that was never here nothing is known but that the others are of its kind.
        needed = HEADROOM * self._sizes.get(k, max(self._sizes.values(), default=0))
        while self._experts and (len(self._experts) >= self.limit if self.limit is not None else self._free(self.device) < needed):
            self._evict(next(iter(self._experts)))

    def _evict(self, k: int) -> None:
        module, objective = self._experts.pop(k)
        if self.device.type != "cpu" and k not in self._waiting and self._free(torch.device("cpu")) > 2 * self._sizes[k]:
            self._waiting[k] = moved(module, pinned), objective


def moved(module: DiT, move: Callable[[Tensor], Tensor]) -> DiT:
    """A module like the one given, with its tensors moved; the one given stays as it is."""
    tensors: dict[int, Tensor] = {id(buffer): move(buffer) for buffer in module.buffers()}
    for parameter in module.parameters():
        tensors[id(parameter)] = nn.Parameter(move(parameter.detach()), requires_grad=parameter.requires_grad)
    copied: DiT = copy.deepcopy(module, tensors)
    return copied


def pinned(tensor: Tensor) -> Tensor:
    """A tensor in host memory, where a GPU reads it without a detour."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


def size(module: nn.Module) -> int:
    """Bytes of a module's weights."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device; on a CPU within the limit of the container, if there is one."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch keeps for itself after a tensor has gone is free as well.
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return memory()[1]
