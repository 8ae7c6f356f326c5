"""Experts in other processes: what the sampler's side and the experts' side say to each other.

Latents, times and guidance travel at every call; text states only when the other side does not have them yet, so replicas may come and go.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paris_ray.diffusion.ensemble import Conditioning, ExpertCall, upload
from paris_ray.inference.experts import ExpertError, LocalExperts, texts_used

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponse

log = logging.getLogger("ray.serve")

CALL_SECONDS = 60.0
"""A group that has not answered a call for so long counts as lost, even if it lives."""
PING_SECONDS = 5.0
"""After so long without an answer a group is asked whether it lives, and has as long to say so. Without that, a call to a process that died between
two calls would wait in Serve's queue until the next one has started."""
CHECK_SECONDS = 5.0
"""How often a group that answers is asked what it holds."""
RETRY_SECONDS = 1.0
"""Pause after a group was lost before it is asked again."""
TEXT_BYTES = 1 << 28
"""Text states that one group keeps (CLIP at 77 × 768: 0.24 MB a text)."""


@dataclass(frozen=True)
class WireCall:
    """Rows for one expert: x (n, C, H, W), t (n,), guidance (n,), float32; the rows' texts and null texts by their keys."""

    expert: int
    x: NDArray[np.float32]
    t: NDArray[np.float32]
    guidance: NDArray[np.float32]
    text_keys: tuple[str, ...]
    null_keys: tuple[str, ...]

    def texts_needed(self) -> list[str]:
        """Keys of the texts that the expert will look at."""
        return texts_used(self.text_keys, self.null_keys, self.guidance.tolist())


@dataclass(frozen=True)
class Answer:
    """Velocities (n, C, H, W) per call, or the keys of the texts without which there are none."""

    velocities: list[NDArray[np.float32]]
    missing: tuple[str, ...] = ()


class RemoteCallee:
    """The experts' side: local experts and the texts they were told.

    Args:
        experts: the experts of this process.
        device: where they compute.
        limit: bytes of text states kept, least recently used out first.
    """

    def __init__(self, experts: LocalExperts, device: torch.device, limit: int = TEXT_BYTES):
        self.experts, self.device, self.limit = experts, device, limit
        self._texts: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def loaded(self) -> list[int]:
        """Indices of the experts that can be called."""
        return [k for k, here in enumerate(self.experts.available()) if here]

    def warm_up(self, latent: tuple[int, int, int], text: tuple[int, int]) -> None:
        """One forward pass of every expert, with latents (C, H, W) and text states (S, D) of zeros."""
        shapes, guidance = np.zeros((1, *latent), np.float32), np.full(1, 2.0, np.float32)
        calls = [WireCall(k, shapes, np.full(1, 0.5, np.float32), guidance, ("warm-up",), ("warm-up",)) for k in self.loaded()]
        if calls:
            self.velocities(calls, {"warm-up": np.zeros(text, np.float32)})

    def velocities(self, calls: Sequence[WireCall], texts: dict[str, NDArray[np.float32]]) -> Answer:
        """Guided velocities, or what is missing for them. Raises ExpertError."""
        with self._lock:
            needed = {key for call in calls for key in call.texts_needed()}
            for key, states in texts.items():
                if key not in self._texts:
                    # A copy: what arrives is a read-only view of a message.
                    self._texts[key] = torch.from_numpy(np.array(states)).to(self.device)
                    self._bytes += self._texts[key].nbytes
            missing = tuple(sorted(needed - self._texts.keys()))
            if missing:
                return Answer([], missing)
            for key in needed:
                self._texts.move_to_end(key)
            while self._bytes > self.limit and len(self._texts) > len(needed):
                self._bytes -= self._texts.popitem(last=False)[1].nbytes
            told = {key: self._texts[key] for key in needed}
        results = self.experts.velocities([self._local(call, told) for call in calls])
        return Answer([v.float().cpu().numpy() for v in results])

    def _local(self, call: WireCall, texts: dict[str, Tensor]) -> ExpertCall:
        text = [texts[key] for key in call.text_keys]
        # Without guidance the null text is not looked at; any will do.
        null = [texts.get(key, text[row]) for row, key in enumerate(call.null_keys)]
        x, t, guidance = (torch.from_numpy(np.array(array)) for array in (call.x, call.t, call.guidance))
        pooled = torch.zeros(len(x), 0)  # experts do not look at it
        cond = Conditioning(text, pooled, null, guidance, call.text_keys, call.null_keys)
        return ExpertCall(call.expert, upload(x, self.device), upload(t, self.device), cond)


@dataclass
class _Group:
    indices: tuple[int, ...]
    handle: DeploymentHandle
    # What it said it holds; empty while it is loading or lost.
    loaded: frozenset[int] = frozenset()
    # Texts that its present replica was told.
    sent: set[str] = field(default_factory=set)
    lost: threading.Event = field(default_factory=threading.Event)
    # Counts losses, so that an answer given before a loss does not undo it.
    losses: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class RemoteExperts:
    """The sampler's side: experts behind Serve handles; implements :class:`paris_ray.diffusion.ensemble.Experts`.

    A group that fails is masked until it answers again; a thread a group asks.

    Args:
        groups: which experts each handle has.
        num_experts: how many experts the model has.
    """

    def __init__(self, groups: Sequence[tuple[tuple[int, ...], DeploymentHandle]], num_experts: int):
        self.num_experts = num_experts
        self._groups = [_Group(indices, handle) for indices, handle in groups]
        self._group_of = {k: group for group in self._groups for k in group.indices}
        self._closed = threading.Event()
        for group in self._groups:
            threading.Thread(target=self._watch, args=(group,), daemon=True, name=f"watch-{group.indices[0]}").start()

    @property
    def placed(self) -> list[bool]:
        """Which experts some group is meant to have."""
        return [k in self._group_of for k in range(self.num_experts)]

    def available(self) -> list[bool]:
        """Which experts can be called now."""
        return [k in self._group_of and k in self._group_of[k].loaded for k in range(self.num_experts)]

    def close(self) -> None:
        """Stop asking the groups."""
        self._closed.set()
        for group in self._groups:
            group.lost.set()

    def velocities(self, calls: Sequence[ExpertCall]) -> list[Tensor]:
        """Guided velocities, one tensor (n, C, H, W) per call; all groups compute at once.

        Raises:
            ExpertError: a group failed, and its experts are no longer available; or one of its experts failed by itself.
        """
        by_group: dict[int, list[int]] = {}
        for position, call in enumerate(calls):
            group = self._group_of.get(call.expert)
            if group is None:
                raise ExpertError(call.expert, "is not placed anywhere")
            by_group.setdefault(self._groups.index(group), []).append(position)
        wires = [_to_wire(call) for call in calls]
        pending = [
            (self._groups[g], positions, self._send(self._groups[g], [calls[p] for p in positions], [wires[p] for p in positions]))
            for g, positions in by_group.items()
        ]
        results: list[Tensor | None] = [None] * len(calls)
        failed: ExpertError | None = None
        for group, positions, response in pending:
            try:
                velocities = self._receive(group, response, [calls[p] for p in positions], [wires[p] for p in positions])
            except ExpertError as error:
                # The others are still waited for, so that no answer is left behind.
                failed = failed or error
                continue
            for position, v in zip(positions, velocities, strict=True):
                results[position] = torch.from_numpy(np.array(v)).to(calls[position].x.device)
        if failed is not None:
            raise failed
        return [v for v in results if v is not None]

    def _send(self, group: _Group, calls: list[ExpertCall], wires: list[WireCall], again: frozenset[str] = frozenset()) -> DeploymentResponse[Any]:
        texts: dict[str, NDArray[np.float32]] = {}
        for call, wire in zip(calls, wires, strict=True):
            wanted = {key for key in wire.texts_needed() if key in again or key not in group.sent} - texts.keys()
            for keys, states in ((wire.text_keys, call.cond.text), (wire.null_keys, call.cond.null_text)):
                for row, key in enumerate(keys):
                    if key in wanted:
                        wanted.discard(key)
                        texts[key] = states[row].float().cpu().numpy()
        if len(group.sent) > 4096:  # only a memory of what need not be sent: forgetting costs one resend
            group.sent.clear()
        group.sent.update(texts)
        return group.handle.velocities.remote(wires, texts)

    def _receive(self, group: _Group, response: DeploymentResponse[Any], calls: list[ExpertCall], wires: list[WireCall]) -> list[NDArray[np.float32]]:
        try:
            answer = self._await(group, response)
            if answer.missing:
                # Another replica than the one that was told, or one that had to forget.
                response = self._send(group, calls, wires, frozenset(key for wire in wires for key in wire.texts_needed()))
                answer = self._await(group, response)
                if answer.missing:
                    raise RuntimeError(f"texts {', '.join(answer.missing)} were sent and are still missing")
            return answer.velocities
        except Exception as error:
            # Ray wraps what the other side raised.
            cause = getattr(error, "cause", None)
            if isinstance(cause, ExpertError):
                raise ExpertError(cause.expert, cause.message) from error
            response.cancel()
            self._lose(group, error)
            raise ExpertError(calls[0].expert, f"its process failed: {type(error).__name__}") from error

    def _await(self, group: _Group, response: DeploymentResponse[Any]) -> Answer:
        """The answer to a call. Raises TimeoutError when the group is gone or stuck, and whatever the other side raised."""
        end = time.monotonic() + CALL_SECONDS
        while True:
            try:
                answer: Answer = response.result(timeout_s=PING_SECONDS)
                return answer
            except TimeoutError:
                if time.monotonic() >= end:
                    raise
            ping = group.handle.loaded.remote()
            try:
                ping.result(timeout_s=PING_SECONDS)
            except TimeoutError:
                ping.cancel()
                raise

    def _lose(self, group: _Group, error: Exception) -> None:
        with group.lock:
            if group.loaded:
                log.warning("experts %s lost: %s: %s", group.indices, type(error).__name__, str(error).partition("\n")[0])
            group.losses += 1
            group.loaded = frozenset()
            group.sent = set()
            group.lost.set()

    def _watch(self, group: _Group) -> None:
        while not self._closed.is_set():
            losses, response = group.losses, None
            try:
                response = group.handle.loaded.remote()
                # One that was there answers at once or is gone; one that is starting may take its time.
                patience = PING_SECONDS if group.loaded else CALL_SECONDS
                loaded = frozenset(response.result(timeout_s=patience)) & frozenset(group.indices)
            except Exception as error:
                if response is not None:
                    response.cancel()
                self._lose(group, error)
            else:
                with group.lock:
                    if losses == group.losses:
                        if loaded != group.loaded:
                            log.info("experts %s: %s ready", group.indices, sorted(loaded) or "none")
                        group.loaded = loaded
                group.lost.wait(CHECK_SECONDS)
            if group.lost.is_set():
                group.lost.clear()
                self._closed.wait(RETRY_SECONDS)


def _to_wire(call: ExpertCall) -> WireCall:
    x, t, guidance = (tensor.float().cpu().numpy() for tensor in (call.x, call.t, call.cond.guidance))
    return WireCall(call.expert, x, t, guidance, call.cond.text_keys, call.cond.null_keys)
