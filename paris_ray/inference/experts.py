"""Experts in this process: guided velocities of modules held in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paris_ray.diffusion.ensemble import Conditioning, ExpertCall
from paris_ray.diffusion.path import Objective
from paris_ray.diffusion.sampler import guided
from paris_ray.inference.residency import Residents
from paris_ray.models import DiT

if TYPE_CHECKING:
    from paris_ray.inference.weights import ExpertFiles, ParisModel

PAD = 8
"""Rows of a CPU batch are padded to a multiple of this: there, and not below, a row's result does not depend on how many others there are."""

CACHE_BYTES = 1 << 30
"""Text keys and values that one process keeps, over all its experts (XL/2 in float32: 20 MB a text and expert)."""


class ExpertError(RuntimeError):
    """An expert could not answer.

    Attributes:
        expert: its index.
    """

    def __init__(self, expert: int, message: str):
        super().__init__(expert, message)
        self.expert, self.message = expert, message

    def __str__(self) -> str:
        return f"expert {self.expert}: {self.message}"


def padded(count: int, device: torch.device) -> int:
    """How many rows a batch of ``count`` is run as."""
    return count + -count % PAD if device.type == "cpu" else count


def pad_rows(x: Tensor, count: int) -> Tensor:
    """Repeat the last row until there are ``count``: (n, …) → (count, …)."""
    return x if len(x) == count else torch.cat([x, x[-1:].expand(count - len(x), *x.shape[1:])])


def row_keys(digest: str) -> tuple[str, str]:
    """The keys of a row's text and of its null text, from ``text:null``; so that requests share the null text's."""
    text, colon, null = digest.partition(":")
    return (text, null) if colon else (f"{text}/text", f"{text}/null")


class _KeysValuesCache:
    """Text keys and values by (expert, key), least recently used out first, bounded in bytes. Each is (L, 2, H, S, D/H)."""

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self.entries: OrderedDict[tuple[int, str], Tensor] = OrderedDict()
        self.hits = self.misses = 0

    def get(self, expert: int, key: str) -> Tensor | None:
        found = self.entries.get((expert, key))
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self.entries.move_to_end((expert, key))
        return found

    def put(self, expert: int, key: str, value: Tensor) -> None:
        self.entries[expert, key] = value
        self.bytes += value.nbytes
        while self.bytes > self.limit and len(self.entries) > 1:
            self.bytes -= self.entries.popitem(last=False)[1].nbytes

    def forget(self, expert: int) -> None:
        for key in [key for key in self.entries if key[0] == expert]:
            self.bytes -= self.entries.pop(key).nbytes


class LocalExperts:
    """Experts of a model, loaded in this process; implements :class:`paris_ray.diffusion.ensemble.Experts`.

    Guidance is applied inside each expert and in velocity space, so that flow and DDPM experts mix. On CPU the bytes of a row's velocity do not
    depend on the other rows of the call.

    Args:
        model: the model, or only its experts.
        indices: which experts to serve; ``None`` serves all whose files are present.
        threads: threads of this *process's* matrix products on CPU; part of what "the same bytes" means.
        cache_bytes: limit of the cache of text keys and values.
        lazy: load an expert when it is first asked, and let go of the least recently used one when memory is short; a file that does not load
            fails those who ask for it. Otherwise all are loaded now and kept.
        max_resident: keep at most so many in memory, down to one; implies ``lazy``. An expert let go is read from its file again, so pictures do not
            depend on it.

    Raises:
        FileNotFoundError: an expert that ``indices`` names has no files.
        ValueError: ``max_resident`` is below one.
    """

    def __init__(
        self,
        model: ParisModel | ExpertFiles,
        indices: Iterable[int] | None = None,
        threads: int = 1,
        cache_bytes: int = CACHE_BYTES,
        lazy: bool = False,
        max_resident: int | None = None,
    ):
        torch.set_num_threads(threads)
        self.model = model
        self.num_experts = model.num_experts
        self._lock = threading.Lock()
        self._cache = _KeysValuesCache(cache_bytes)
        lazy = lazy or max_resident is not None
        self._residents = Residents(model.load_expert, model.device, max_resident if lazy else model.num_experts)
        self._served: set[int] = set()
        for k in range(model.num_experts) if indices is None else indices:
            here = 0 <= k < model.num_experts and model.present[k]
            if lazy and here:
                self._served.add(k)
            elif here or indices is not None:
                self.load(k)  # of one that is not there, says what is missing

    def load(self, k: int) -> None:
        """Load an expert, or load it again after its files were replaced. Raises what ``ParisModel.load_expert`` does."""
        loaded = self.model.load_expert(k)  # without the lock: the others go on
        with self._lock:
            self._residents.put(k, loaded)
            self._cache.forget(k)
            self._served.add(k)

    def unload(self, k: int) -> None:
        """Retire an expert; from now on it is masked."""
        with self._lock:
            self._served.discard(k)
            self._residents.drop(k)
            self._cache.forget(k)

    def available(self) -> list[bool]:
        """Which experts can be asked."""
        return [k in self._served for k in range(self.num_experts)]

    @property
    def resident(self) -> list[bool]:
        """Which experts are in memory now."""
        return [k in self._residents for k in range(self.num_experts)]

    @property
    def loads(self) -> int:
        """How often an expert was read from its file."""
        return self._residents.loads

    @property
    def cache_stats(self) -> dict[str, int]:
        """Hits, misses, entries and bytes of the cache of text keys and values."""
        cache = self._cache
        return {"hits": cache.hits, "misses": cache.misses, "entries": len(cache.entries), "bytes": cache.bytes}

    @torch.inference_mode()
    def velocities(self, calls: Sequence[ExpertCall]) -> list[Tensor]:
        """Guided velocities, float32, one tensor (n, C, H, W) per call.

        Raises:
            ExpertError: an expert is not loaded, or failed; names it.
        """
        # Those in memory first: in turn, each would make room for the one before it, and every one be read again at every step.
        order = sorted(range(len(calls)), key=lambda i: calls[i].expert not in self._residents)
        velocities = {i: self._velocity(calls[i]) for i in order}
        return [velocities[i] for i in range(len(calls))]

    def _velocity(self, call: ExpertCall) -> Tensor:
        with self._lock:
            if call.expert not in self._served:
                raise ExpertError(call.expert, "is not loaded")
            try:
                module, objective = self._residents.get(call.expert)
                keys_values, cond = self._keys_values(call, module)
                return self._guided(call, cond, module, objective, keys_values)
            except Exception as error:
                raise ExpertError(call.expert, f"{type(error).__name__}: {error}") from error

    def _keys_values(self, call: ExpertCall, module: DiT) -> tuple[Tensor, Conditioning]:
        """Keys and values of the call's distinct texts, (U, L, 2, H, S, D/H), and a conditioning whose "texts" are rows of it."""
        cond = call.cond
        table: dict[str, int] = {}
        stacked: list[Tensor] = []

        def row(key: str, states: Tensor) -> int:
            if key not in table:
                table[key] = len(stacked)
                found = self._cache.get(call.expert, key)
                if found is None:
                    # One text at a time: always the same shape, so the same bytes in any company.
                    pairs = module.text_keys_values(states.unsqueeze(0).to(module.text_proj.weight.dtype))
                    found = torch.stack([torch.stack([k[0], v[0]]) for k, v in pairs])  # (L, 2, H, S, D/H)
                    self._cache.put(call.expert, key, found)
                stacked.append(found)
            return table[key]

        guidance = cond.guidance.tolist()
        keys = [row_keys(digest) for digest in cond.digests]
        text = [row(key, cond.text[i]) for i, (key, _) in enumerate(keys)]
        # The null text of a row without guidance is never looked at.
        null = [row(key, cond.null_text[i]) if guidance[i] != 1 else 0 for i, (_, key) in enumerate(keys)]
        device = call.x.device
        indices = Conditioning(torch.tensor(text, device=device), cond.pooled, torch.tensor(null, device=device), cond.guidance, cond.digests)
        return torch.stack(stacked), indices

    @staticmethod
    def _guided(call: ExpertCall, cond: Conditioning, module: DiT, objective: Objective, keys_values: Tensor) -> Tensor:
        dtype = module.patch_embed.weight.dtype

        def velocity(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
            n = len(x)
            count = padded(n, x.device)
            x, t, text = pad_rows(x, count), pad_rows(t, count), pad_rows(text, count)
            pieces = [slice(i, i + PAD) for i in range(0, count, PAD)] if x.device.type == "cpu" else [slice(None)]
            # In pieces of one size: torch takes other code for atan2, log1p … of a few times than of many, and its last bit differs.
            states, times = zip(*(objective.model_input(x[piece], t[piece]) for piece in pieces), strict=True)
            rows = keys_values[text]  # (n, L, 2, H, S, D/H)
            pairs = [(rows[:, layer, 0], rows[:, layer, 1]) for layer in range(rows.shape[1])]
            output = module(torch.cat(states).to(dtype), torch.cat(times), keys_values=pairs).float()  # (n, C, H, W)
            return torch.cat([objective.velocity(output[piece], x[piece], t[piece]) for piece in pieces])[:n]

        return guided(velocity, call.x.float(), call.t.float(), cond)
