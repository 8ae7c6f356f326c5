"""Text keys and values of experts, computed once and kept while they are in use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from paris_ray.inference.residency import free_memory
from paris_ray.models import DiT

SPARE_BYTES = 1 << 30
"""Text keys and values kept beside those in use (XL/2 in float32: 20 MB a text and expert)."""

KeysValues: TypeAlias = "tuple[Tensor, ...]"
"""Of one text, by layer: (2, H, S, D/H) each."""


class TextCache:
    """Keys and values by (expert, text), least recently used out first. Not thread-safe; its owner locks.

    What the call at hand uses is never let go: a cache that is smaller than what is asked for in the same order again and again would never be hit.
    Beside it, ``spare`` bytes are kept, or a quarter of the free memory where that is less.

    Args:
        device: whose memory they take.
        spare: bytes kept beside those in use.
    """

    def __init__(self, device: torch.device, spare: int = SPARE_BYTES):
        self.device, self.spare, self.bytes = device, spare, 0
        self.entries: OrderedDict[tuple[int, str], KeysValues] = OrderedDict()
        self.hits = self.misses = 0
        self._in_use: set[tuple[int, str]] = set()

    def use(self, names: Iterable[tuple[int, str]]) -> None:
        """Say which (expert, text) are in use now, until the next time."""
        self._in_use = set(names)

    def get(self, expert: int, states: Mapping[str, Tensor], module: DiT) -> dict[str, KeysValues]:
        """Keys and values of texts.

        Args:
            expert: whose.
            states: states (S, D) of each text, by its key.
            module: the expert, asked for those that are not here.
        """
        missing = [key for key in states if (expert, key) not in self.entries]
        self.hits += len(states) - len(missing)
        self.misses += len(missing)
        # On a CPU one text at a time: always the same shape, so the same bytes in any company.
        size = 1 if self.device.type == "cpu" else max(1, len(missing))
        for i in range(0, len(missing), size):
            some = missing[i : i + size]
            batch = torch.stack([states[key] for key in some]).to(module.text_proj.weight.dtype)  # (U, S, D)
            layers = [torch.stack(pair, dim=1) for pair in module.text_keys_values(batch)]  # L × (U, 2, H, S, D/H)
            for row, key in enumerate(some):
                # Each its own memory, which goes when it goes.
                self._put(expert, key, tuple(layer[row].clone() if len(some) > 1 else layer[0] for layer in layers))
        for key in states:
            self.entries.move_to_end((expert, key))
        found = {key: self.entries[expert, key] for key in states}
        if missing:
            self._trim()
        return found

    def _put(self, expert: int, key: str, value: KeysValues) -> None:
        self.entries[expert, key] = value
        self.bytes += size_of(value)

    def _trim(self) -> None:
        using = sum(size_of(self.entries[name]) for name in self._in_use if name in self.entries)
        limit = using + min(self.spare, free_memory(self.device) // 4)
        for name in [name for name in self.entries if name not in self._in_use]:
            if self.bytes <= limit:
                return
            self._drop(name)

    def _drop(self, name: tuple[int, str]) -> None:
        self.bytes -= size_of(self.entries.pop(name))

    def forget(self, expert: int) -> None:
        """Forget all texts of an expert."""
        for name in [name for name in self.entries if name[0] == expert]:
            self._drop(name)


def size_of(value: KeysValues) -> int:
    """Bytes of keys and values."""
    return sum(layer.nbytes for layer in value)
