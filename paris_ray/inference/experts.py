"""Experts in this process: guided velocities of modules held in memory."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paris_ray.diffusion.ensemble import ExpertCall
from paris_ray.diffusion.path import Objective, as_velocity
from paris_ray.diffusion.sampler import guided
from paris_ray.inference.residency import Residents
from paris_ray.inference.text_cache import SPARE_BYTES, KeysValues, TextCache
from paris_ray.models import DiT

if TYPE_CHECKING:
    from paris_ray.inference.weights import ExpertFiles, ParisModel


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
    """How many rows a batch of ``count`` is run as: on a CPU as they are; elsewhere 1, 2, 4, or eights, so that compiled blocks see few shapes."""
    if device.type == "cpu":
        return count
    return count + -count % 8 if count > 4 else 1 << (count - 1).bit_length()


def pad_rows(x: Tensor, count: int) -> Tensor:
    """Repeat the last row until there are ``count``: (n, …) → (count, …)."""
    return x if len(x) == count else torch.cat([x, x[-1:].expand(count - len(x), *x.shape[1:])])


class ExpertGone(ExpertError):
    """It is not there, or no longer."""


class LocalExperts:
    """Experts of a model, loaded in this process; implements :class:`paris_ray.diffusion.ensemble.Experts`.

    Guidance is applied inside each expert and in velocity space, so that flow and DDPM experts mix. On CPU the bytes of a row's velocity do not
    depend on the other rows of the call, at one number of threads that is a power of two: at the seams of other shares torch's GELU rounds otherwise.

    Args:
        model: the model, or only its experts.
        indices: which experts to serve; ``None`` serves all whose files are present.
        threads: threads of this *process's* matrix products on CPU, part of what "the same bytes" means; ``None`` leaves them as they are.
        cache_bytes: text keys and values kept beside those in use, at most.
        lazy: load an expert when it is first asked, and let go of the least recently used one when memory is short; a file that does not load
            fails those who ask for it. Otherwise all are loaded now.
        max_resident: keep at most so many in memory, down to one; implies ``lazy``. An expert let go comes back as it was, so pictures do not depend
            on it; see :class:`paris_ray.inference.residency.Residents` for where it waits.
        load: reads an expert into CPU memory when it is asked and not there; ``None`` reads the model's files as they are then.

    Raises:
        FileNotFoundError: an expert that ``indices`` names has no files.
        ValueError: ``max_resident`` is below one.
    """

    def __init__(
        self,
        model: ParisModel | ExpertFiles,
        indices: Iterable[int] | None = None,
        threads: int | None = None,
        cache_bytes: int = SPARE_BYTES,
        lazy: bool = False,
        max_resident: int | None = None,
        load: Callable[[int], tuple[DiT, Objective]] | None = None,
    ):
        if threads is not None:
            torch.set_num_threads(threads)
        self.model = model
        self.num_experts = model.num_experts
        self._lock = threading.Lock()
        self._texts = TextCache(model.device, cache_bytes)
        lazy = lazy or max_resident is not None
        load, limit = load or functools.partial(model.load_expert, on_host=True), max_resident if lazy else model.num_experts
        self._residents = Residents(load, model.device, limit, compile=model.compile)
        self._served: set[int] = set()
        self._version: dict[int, str] = {}
        self.versions: dict[int, tuple[str, ...]] = {}
        """What :meth:`put` called the weights that answered last, by expert."""
        self.latest: dict[int, Tensor] = {}
        """The last velocities that each expert answered, for whoever watches over them."""
        for k in range(model.num_experts) if indices is None else indices:
            here = 0 <= k < model.num_experts and model.present[k]
            if lazy and here:
                self._served.add(k)
            elif here or indices is not None:
                self.load(k)  # of one that is not there, says what is missing

    def load(self, k: int) -> None:
        """Load an expert, or load it again after its files were replaced. Raises what ``ParisModel.load_expert`` does."""
        self.put(k, self.model.load_expert(k, on_host=True))  # without the lock: the others go on

    def put(self, k: int, loaded: tuple[DiT, Objective], version: str | None = None) -> None:
        """Serve an expert that was read into CPU memory, between two calls, in the place of an older one of that number if there is one.

        Args:
            k: its number.
            loaded: network and objective, in the model's precision.
            version: what to call these weights.
        """
        with self._lock:
            self._residents.put(k, loaded)
            self._texts.forget(k)
            self._served.add(k)
            self._version.pop(k, None)
            if version is not None:
                self._version[k] = version

    def unload(self, k: int) -> None:
        """Retire an expert; from now on it is masked."""
        with self._lock:
            self._served.discard(k)
            self._residents.drop(k)
            self._texts.forget(k)

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
        texts = self._texts
        return {"hits": texts.hits, "misses": texts.misses, "entries": len(texts.entries), "bytes": texts.bytes}

    @torch.inference_mode()
    def velocities(self, calls: Sequence[ExpertCall]) -> list[Tensor]:
        """Guided velocities, float32, one tensor (n, C, H, W) per call.

        Raises:
            ExpertError: an expert is not loaded, or failed; names it.
        """
        self.announce(calls)
        # Those in memory first: in turn, each would make room for the one before it, and every one be read again at every step.
        order = sorted(range(len(calls)), key=lambda i: calls[i].expert not in self._residents)
        answers = {i: self.answer(calls[i]) for i in order}
        self.versions = {calls[i].expert: (version,) for i in order if (version := answers[i][1]) is not None}
        return [answers[i][0] for i in range(len(calls))]

    def announce(self, calls: Sequence[ExpertCall]) -> Sequence[ExpertCall]:
        """Keep the texts of these calls, which are to be answered one by one."""
        with self._lock:
            self._texts.use((call.expert, key) for call in calls for key in _texts_of(call))
        return calls

    @torch.inference_mode()
    def answer(self, call: ExpertCall) -> tuple[Tensor, str | None]:
        """Guided velocities of one call, and the version of the weights that made them. Raises ExpertError."""
        with self._lock:
            if call.expert not in self._served:
                raise ExpertGone(call.expert, "is not loaded")
            try:
                module, objective = self._residents.get(call.expert)
                v = self._residents.retried(lambda: self._guided(call, module, objective), keep=call.expert)
                self.latest[call.expert] = v
                return v, self._version.get(call.expert)
            except Exception as error:
                raise ExpertError(call.expert, f"{type(error).__name__}: {error}") from error

    def _guided(self, call: ExpertCall, module: DiT, objective: Objective) -> Tensor:
        cond, dtype = call.cond, module.patch_embed.weight.dtype
        states = dict(zip(cond.null_keys, cond.null_text, strict=True)) | dict(zip(cond.text_keys, cond.text, strict=True))
        table = self._texts.get(call.expert, {key: states[key] for key in _texts_of(call)}, module)
        of_model = as_velocity(module, objective, dtype)

        def velocity(x: Tensor, t: Tensor, texts: list[KeysValues]) -> Tensor:
            n, count = len(x), padded(len(x), x.device)
            rows = _layer_by_layer(texts + texts[-1:] * (count - n))
            return of_model(pad_rows(x, count), pad_rows(t, count), keys_values=rows)[:n]

        # That of a row without guidance is not looked at.
        rows = dataclasses.replace(cond, text=[table[key] for key in cond.text_keys], null_text=[table.get(key) for key in cond.null_keys])
        return guided(velocity, call.x.float(), call.t.float(), rows)


def texts_used(text_keys: Sequence[str], null_keys: Sequence[str], guidance: Sequence[float]) -> list[str]:
    """Keys of the texts that an expert looks at, each once: a null text only where there is guidance."""
    return list(dict.fromkeys([*text_keys, *(key for key, scale in zip(null_keys, guidance, strict=True) if scale != 1)]))


def _texts_of(call: ExpertCall) -> list[str]:
    return texts_used(call.cond.text_keys, call.cond.null_keys, call.cond.guidance.tolist())


def _layer_by_layer(texts: Sequence[KeysValues]) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of the rows, two of (n, H, S, D/H) a layer, each gathered when its layer comes: never those of all layers at once."""
    for layers in zip(*texts, strict=True):
        keys, values = torch.stack(layers, dim=1)
        yield keys, values
