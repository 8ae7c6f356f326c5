"""Experts in other processes: what the sampler's side and the experts' side say to each other.

Latents, times and guidance travel at every call; text states only when the other side does not have them yet, so replicas may come and go.
"""

from __future__ import annotations

import logging
import math
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
from paris_ray.inference.experts import ExpertError, ExpertGone, LocalExperts, texts_used
from serve_app.cards import ExpertState

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponse

log = logging.getLogger("ray.serve")

CALL_SECONDS = 60.0
"""A group that has not answered a call for so long counts as lost, even if it lives."""
PLACE_SECONDS = 3.0
"""A group of which no process has taken a call for so long is lost: the call would wait in Serve's queue until the next process has started, which is
longer than a picture takes without the group. Every process takes all that samplers can send at once, so a busy one is not meant."""
PING_SECONDS = 5.0
"""After so long without an answer a group that has taken a call is asked whether it lives, and has as long to say so."""
CHECK_SECONDS = 2.0
"""How often a group that answers is asked what it holds."""
RETRY_SECONDS = 1.0
"""Pause after a group was lost before it is asked again."""
PIECE_ROWS = 8
"""Rows that go to one of several replicas of a group at once are a multiple of so many."""
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
    """Velocities (n, C, H, W) per call and the versions of the weights that made them, or the keys of the texts without which there are none."""

    velocities: list[NDArray[np.float32]]
    missing: tuple[str, ...] = ()
    versions: tuple[str | None, ...] = ()


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
        answers = [self.experts.answer(call) for call in self.experts.announce([self._local(call, told) for call in calls])]
        return Answer([v.float().cpu().numpy() for v, _ in answers], versions=tuple(version for _, version in answers))

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
    # At most; with several, rows are sent in pieces, so that each has something to do.
    replicas: int = 1
    # What it said of its experts; empty while it is starting or lost.
    states: dict[int, ExpertState] = field(default_factory=dict)
    # Why it is lost.
    error: str = ""
    seen: bool = False
    # Texts that a replica of it has, or had.
    sent: set[str] = field(default_factory=set)
    # Set to have it asked at once.
    asked: threading.Event = field(default_factory=threading.Event)
    # Counts losses, so that an answer given before a loss does not undo it.
    losses: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def state(self, k: int) -> ExpertState:
        """Of one of its experts."""
        if self.error:
            return ExpertState(k, "dead", f"its process does not answer: {self.error}")
        return self.states.get(k, ExpertState(k, "loading", "its process is starting"))


@dataclass
class _Piece:
    """Calls that go to a group together; the positions are those of the engine's calls that they are, or are part of."""

    group: _Group
    positions: list[int]
    calls: list[ExpertCall]
    wires: list[WireCall]
    # When it was, last.
    sent: float = 0.0


class RemoteExperts:
    """The sampler's side: experts behind Serve handles; implements :class:`paris_ray.diffusion.ensemble.Experts`.

    A group that fails is masked until it answers again; a thread a group asks.

    Args:
        groups: which experts each handle has, and how many replicas are behind it at most.
        num_experts: how many experts the model has.
    """

    def __init__(self, groups: Sequence[tuple[tuple[int, ...], DeploymentHandle, int]], num_experts: int):
        self.num_experts = num_experts
        self.versions: dict[int, tuple[str, ...]] = {}
        """What the weights are called that answered last, by expert; several where replicas of a group differ."""
        self._groups = [_Group(*group) for group in groups]
        self._group_of = {k: group for group in self._groups for k in group.indices}
        self._closed = threading.Event()
        for group in self._groups:
            threading.Thread(target=self._watch, args=(group,), daemon=True, name=f"watch-{group.indices[0]}").start()

    def states(self) -> list[ExpertState]:
        """Of every expert, as far as it is known."""
        nowhere = "it is placed nowhere"
        return [self._group_of[k].state(k) if k in self._group_of else ExpertState(k, "missing", nowhere) for k in range(self.num_experts)]

    def available(self) -> list[bool]:
        """Which experts can be called now."""
        return [state.state == "ready" for state in self.states()]

    def close(self) -> None:
        """Stop asking the groups."""
        self._closed.set()
        for group in self._groups:
            group.asked.set()

    def velocities(self, calls: Sequence[ExpertCall]) -> list[Tensor]:
        """Guided velocities, one tensor (n, C, H, W) per call; all groups compute at once.

        Raises:
            ExpertError: a group failed, and its experts are no longer available; or one of its experts failed by itself.
        """
        pending = [(piece, self._send(piece)) for piece in self._pieces(calls)]
        results: list[list[Tensor]] = [[] for _ in calls]
        versions: dict[int, dict[str, None]] = {}
        failed: ExpertError | None = None
        for piece, response in pending:
            try:
                answer = self._receive(piece, response)
            except ExpertError as error:
                # The others are still waited for, so that no answer is left behind.
                failed = failed or error
                continue
            for position, v, version in zip(piece.positions, answer.velocities, answer.versions, strict=True):
                results[position].append(torch.from_numpy(np.array(v)).to(calls[position].x.device))
                if version is not None:
                    versions.setdefault(calls[position].expert, {})[version] = None
        if failed is not None:
            raise failed
        self.versions = {k: tuple(theirs) for k, theirs in versions.items()}
        return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in results]

    def _pieces(self, calls: Sequence[ExpertCall]) -> list[_Piece]:
        whole: dict[int, _Piece] = {}
        pieces = []
        for position, call in enumerate(calls):
            group = self._group_of.get(call.expert)
            if group is None:
                raise ExpertError(call.expert, "is not placed anywhere")
            if group.replicas == 1:
                if id(group) not in whole:
                    pieces.append(whole.setdefault(id(group), _Piece(group, [], [], [])))
                piece = whole[id(group)]
                piece.positions.append(position)
                piece.calls.append(call)
                piece.wires.append(_to_wire(call))
                continue
            for part in _cut(call, group.replicas):
                pieces.append(_Piece(group, [position], [part], [_to_wire(part)]))
        return pieces

    def _send(self, piece: _Piece, again: bool = False) -> DeploymentResponse[Any]:
        group, texts = piece.group, dict[str, "NDArray[np.float32]"]()
        for call, wire in zip(piece.calls, piece.wires, strict=True):
            wanted = {key for key in wire.texts_needed() if again or key not in group.sent} - texts.keys()
            for keys, states in ((wire.text_keys, call.cond.text), (wire.null_keys, call.cond.null_text)):
                for row, key in enumerate(keys):
                    if key in wanted:
                        wanted.discard(key)
                        texts[key] = states[row].float().cpu().numpy()
        piece.sent = time.monotonic()
        return group.handle.velocities.remote(piece.wires, texts)

    def _receive(self, piece: _Piece, response: DeploymentResponse[Any]) -> Answer:
        group, calls = piece.group, piece.calls
        try:
            try:
                answer = self._await(piece, response, CALL_SECONDS / min(group.replicas, 2))
            except Exception as error:
                if group.replicas == 1 or not (_died(error) or isinstance(error, TimeoutError)):
                    raise
                # Of several replicas one has died or hangs, and another one gives the same answer.
                response.cancel()
                response = self._send(piece, again=True)
                answer = self._await(piece, response)
            if answer.missing:
                # Another replica than the one that was told, or one that had to forget.
                response = self._send(piece, again=True)
                answer = self._await(piece, response)
                if answer.missing:
                    raise RuntimeError(f"texts {', '.join(answer.missing)} were sent and are still missing")
            if len(group.sent) > 4096:  # only a memory of what need not be sent: forgetting costs one resend
                group.sent.clear()
            # Only now: other pieces of this step went to other replicas.
            group.sent.update(key for wire in piece.wires for key in wire.texts_needed())
            return answer
        except Exception as error:
            # Ray wraps what the other side raised.
            cause = getattr(error, "cause", None)
            if isinstance(cause, ExpertGone):
                self._forget(group, cause.expert)
            if isinstance(cause, ExpertError):
                raise ExpertError(cause.expert, cause.message) from error
            response.cancel()
            self._lose(group, error)
            raise ExpertError(calls[0].expert, f"its process failed: {type(error).__name__}") from error

    def _await(self, piece: _Piece, response: DeploymentResponse[Any], seconds: float | None = None) -> Answer:
        """The answer to a call. Raises TimeoutError when the group is gone or stuck, and whatever the other side raised."""
        _placed(response, piece.sent + PLACE_SECONDS - time.monotonic())
        end = piece.sent + (CALL_SECONDS if seconds is None else seconds)
        while True:
            try:
                answer: Answer = response.result(timeout_s=PING_SECONDS)
                return answer
            except TimeoutError:
                if time.monotonic() >= end:
                    raise
            ping = piece.group.handle.states.remote()
            try:
                ping.result(timeout_s=PING_SECONDS)
            except TimeoutError:
                ping.cancel()
                raise

    def _forget(self, group: _Group, k: int) -> None:
        """An expert has gone and its process has not: it is masked, and what the others are is asked anew."""
        with group.lock:
            group.states = {**group.states, k: ExpertState(k, "missing", "it is no longer there")}
            group.losses += 1
            group.asked.set()

    def _lose(self, group: _Group, error: Exception) -> None:
        with group.lock:
            if group.states:
                log.warning("experts %s lost: %s: %s", group.indices, type(error).__name__, str(error).partition("\n")[0])
            group.losses += 1
            group.error = type(error).__name__ if group.seen else ""
            group.states = {}
            group.sent = set()
            group.asked.set()

    def _watch(self, group: _Group) -> None:
        while not self._closed.is_set():
            losses, response = group.losses, None
            try:
                response = group.handle.states.remote()
                # One that was there answers at once or is gone; one that is starting may take its time.
                if group.states:
                    _placed(response, PLACE_SECONDS)
                patience = PING_SECONDS if group.states else CALL_SECONDS
                states = {state.index: state for state in response.result(timeout_s=patience) if state.index in group.indices}
            except Exception as error:
                if response is not None:
                    response.cancel()
                self._lose(group, error)
            else:
                with group.lock:
                    if losses == group.losses:
                        if states != group.states:
                            log.info("experts: %s", ", ".join(f"{k} {state.state}" for k, state in sorted(states.items())))
                        group.states, group.error, group.seen = states, "", True
                group.asked.wait(RETRY_SECONDS if any(state.state == "loading" for state in states.values()) else CHECK_SECONDS)
            if group.asked.is_set():
                group.asked.clear()
                self._closed.wait(RETRY_SECONDS)


def _placed(response: DeploymentResponse[Any], seconds: float) -> None:
    """Wait until a process has been found for a call. Raises TimeoutError."""
    response._to_object_ref_sync(max(seconds, 0.0))  # the one thing of Serve's interface that says so


def _died(error: Exception) -> bool:
    from ray.exceptions import RayActorError

    return isinstance(error, RayActorError)


def _cut(call: ExpertCall, replicas: int) -> list[ExpertCall]:
    """A call as several, one a replica, of a multiple of :data:`PIECE_ROWS` rows each but for the last."""
    rows = math.ceil(len(call.x) / replicas / PIECE_ROWS) * PIECE_ROWS
    parts = [list(range(first, min(first + rows, len(call.x)))) for first in range(0, len(call.x), rows)]
    if len(parts) == 1:
        return [call]
    return [ExpertCall(call.expert, call.x[part[0] : part[-1] + 1], call.t[part[0] : part[-1] + 1],
                       call.cond.take(part, torch.tensor(part, device=call.x.device))) for part in parts]  # fmt: skip


def _to_wire(call: ExpertCall) -> WireCall:
    x, t, guidance = (tensor.float().cpu().numpy() for tensor in (call.x, call.t, call.cond.guidance))
    return WireCall(call.expert, x, t, guidance, call.cond.text_keys, call.cond.null_keys)
