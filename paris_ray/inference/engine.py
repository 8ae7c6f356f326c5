"""The sampling engine: many pictures at once, each at its own step, solver, guidance and routing.

One :meth:`Engine.tick` is one velocity for every active row: one router pass over all of them, one call per expert that has rows, one step of each
row's own solver. Finished rows leave and waiting ones join at every tick, so no request waits for another's end. Where the experts live is not the
engine's business (:class:`paris_ray.diffusion.ensemble.Experts`).
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from paris_ray import rng
from paris_ray.diffusion.ensemble import Conditioning, Experts, ensemble_velocity, routing_weights
from paris_ray.diffusion.path import x0_from_velocity
from paris_ray.diffusion.routing import Routing
from paris_ray.diffusion.sampler import SOLVERS, Solver, evaluations, guidance_at, initial_noise, time_grid
from paris_ray.inference.experts import ExpertError, LocalExperts, pad_rows, padded
from paris_ray.inference.prompts import EncodedPrompt, Prompts
from paris_ray.inference.request import EngineFull, EngineStopped, ImageRequest, ImageResult, Preview, validate

if TYPE_CHECKING:
    from paris_ray.inference.weights import ParisModel

__all__ = ["ANY_NUMBER", "Engine", "EngineFull", "EngineStopped", "ImageRequest", "ImageResult", "Preview", "generate"]

ANY_NUMBER = 1 << 20
"""A queue for callers who wait for all that they submit."""


@dataclass(frozen=True, eq=False)
class _Ticket:
    """A picture that waits: its request with every default filled in, and where its result goes."""

    request: ImageRequest
    steps: int
    guidance: float
    solver: str
    routing: Routing
    future: Future[ImageResult]
    noise: Tensor | None
    preview: Callable[[Preview], None] | None
    preview_every: int
    submitted: float


@dataclass(eq=False)
class _Row:
    """A picture on its way."""

    ticket: _Ticket
    text: EncodedPrompt
    null: EncodedPrompt
    solver: Solver
    x: Tensor
    t: float
    expert: int | None  # the one expert of ``caption`` (once drawn) and ``expert-k``
    history: list[dict[str, Any]] = field(default_factory=list)
    masked: set[int] = field(default_factory=set)
    setbacks: int = 0


@dataclass(frozen=True, eq=False)
class _Look:
    """A preview to be decoded."""

    row: _Row
    show: Callable[[Preview], None]
    evaluation: int
    t: float
    latent: Tensor


class Engine:
    """Step-level batching over any :class:`Experts`.

    :meth:`submit`, cancellation and :attr:`metrics` may come from any thread; :meth:`tick` from one at a time, which is the engine's own after
    :meth:`start`.

    Args:
        model: router, codec, text encoder, null text and defaults.
        experts: where velocities come from.
        max_rows: pictures stepped at once.
        max_queue: pictures that may wait.
    """

    def __init__(self, model: ParisModel, experts: Experts, max_rows: int = 64, max_queue: int = 256):
        if max_rows < 1 or max_queue < 1:
            raise ValueError(f"max_rows {max_rows} and max_queue {max_queue} must be at least 1")
        self.model, self.experts, self.max_rows, self.max_queue = model, experts, max_rows, max_queue
        self._waiting: OrderedDict[str, deque[_Ticket]] = OrderedDict()  # by client, next client first
        self._active: list[_Row] = []
        self._prompts = Prompts(model)
        self._driving = threading.RLock()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._counts = {"ticks": 0, "evaluations": 0, "finished": 0, "failed": 0, "cancelled": 0, "rejected": 0}
        self._expert_rows = [0] * model.num_experts

    # -- from any thread ----------------------------------------------------------------------------------------------------

    def validate(self, request: ImageRequest) -> ImageRequest:
        """The request with the model's defaults filled in. Raises ValueError that names field, value and rule."""
        return validate(request, self.model)

    def submit(
        self,
        request: ImageRequest,
        preview: Callable[[Preview], None] | None = None,
        preview_every: int = 5,
        noise: Tensor | None = None,
    ) -> Future[ImageResult]:
        """Queue a picture.

        Args:
            request: what to draw.
            preview: called from the engine's thread every ``preview_every`` evaluations.
            preview_every: evaluations between previews.
            noise: to start from instead of the seed's, (C, H, W).

        Returns:
            a future. Its ``cancel()`` works until the picture is done and frees the row at the next tick.

        Raises:
            ValueError: the request is not valid.
            EngineFull: ``max_queue`` pictures wait already.
            EngineStopped: the engine was stopped.
        """
        if preview_every < 1:
            raise ValueError(f"preview_every: {preview_every} must be at least 1")
        if noise is not None and tuple(noise.shape) != self.model.latent_shape:
            raise ValueError(f"noise: its shape {tuple(noise.shape)} must be {self.model.latent_shape}, that of this model's latents")
        ticket = self._ticket(self.validate(request), noise, preview, preview_every)
        with self._changed:
            if self._stopping:
                raise EngineStopped("the engine was stopped")
            self._forget_cancelled()
            if self._queued() >= self.max_queue:
                self._counts["rejected"] += 1
                raise EngineFull(f"{self.max_queue} pictures wait already, the most that may; try again later")
            self._waiting.setdefault(request.client, deque()).append(ticket)
            self._changed.notify_all()
        return ticket.future

    def _ticket(self, request: ImageRequest, noise: Tensor | None, preview: Callable[[Preview], None] | None, preview_every: int) -> _Ticket:
        steps, guidance, solver, routing = request.steps, request.guidance_scale, request.solver, request.routing
        if steps is None or guidance is None or solver is None or routing is None:
            raise ValueError("steps, guidance_scale, solver and routing: the model has no default for one of them; give all four")
        parsed = Routing.parse(routing, self.model.num_experts)
        return _Ticket(request, steps, float(guidance), solver, parsed, Future(), noise, preview, preview_every, time.monotonic())

    @property
    def metrics(self) -> dict[str, Any]:
        """Counters since the start, and what waits and runs now."""
        with self._changed:
            return {**self._counts, "queued": self._queued(), "active": len(self._active), "rows_per_expert": list(self._expert_rows)}

    def start(self) -> None:
        """Run ticks in a thread of the engine's own until :meth:`stop`."""
        if self._thread is not None or self._stopping:
            raise RuntimeError("an engine is started once")
        self._thread = threading.Thread(target=self._run, daemon=True, name="engine")
        self._thread.start()

    def stop(self) -> None:
        """Stop after the tick at hand; pictures that are not done fail with EngineStopped."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._abandon(EngineStopped("the engine was stopped before the picture was done"))

    def _abandon(self, error: Exception) -> None:
        with self._changed:
            self._stopping = True
            tickets = [*(row.ticket for row in self._active), *(ticket for queue in self._waiting.values() for ticket in queue)]
            self._active, self._waiting = [], OrderedDict()
        for ticket in tickets:
            self._fail(ticket, error)

    @property
    def running(self) -> bool:
        """Whether the engine has a thread of its own, and it lives."""
        return self._thread is not None and self._thread.is_alive()

    def run_until_idle(self) -> None:
        """Run ticks in this thread until nothing waits or runs; for scripts."""
        if self.running:
            raise RuntimeError("the engine's own thread runs already")
        with self._driving:  # of two threads, one draws the other's pictures too
            while self.tick():
                pass

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (self._stopping or self._active or self._waiting):
                        self._changed.wait()
                    if self._stopping:
                        return
                self.tick()
        except BaseException as error:
            # Nobody may wait for ever for a thread that is no more.
            self._abandon(EngineStopped(f"the engine failed: {type(error).__name__}: {error}"))
            raise

    # -- one tick -----------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def tick(self, after: Callable[[Tensor], Tensor] | None = None) -> bool:
        """Admit waiting rows, then one evaluation for each active one.

        Args:
            after: shown where the rows have come to, (N, C, H, W) in the order of their submission, and gives what they go on from; for a caller that
                knows them all to be at the end of a step.

        Returns:
            whether anything is left to do.
        """
        self._drop_cancelled()
        self._admit()
        rows = list(self._active)
        if rows:
            try:
                self._advance(rows, after)
            except Exception as error:
                # Nothing says whose fault it is. Those who wait get their turn.
                for row in rows:
                    self._fail(row.ticket, error)
        with self._changed:
            self._counts["ticks"] += 1
            return bool(self._active or self._waiting)

    @torch.inference_mode()
    def finish(self) -> None:
        """Let all active rows leave as they are, decoded: for a caller who has seen enough."""
        self._finish(list(self._active))

    def _admit(self) -> None:
        while len(self._active) < self.max_rows:
            with self._changed:
                if not self._waiting:
                    return
                # Clients take turns.
                client, queue = self._waiting.popitem(last=False)
                ticket = queue.popleft()
                if queue:
                    self._waiting[client] = queue
            try:
                row = self._begin(ticket)
            except Exception as error:
                self._fail(ticket, error)
                continue
            with self._changed:
                self._active.append(row)

    def _begin(self, ticket: _Ticket) -> _Row:
        request, model = ticket.request, self.model
        text, null = self._prompts(request.prompt), self._prompts(request.negative_prompt)
        noise = initial_noise(request.seed, request.index, model.latent_shape) if ticket.noise is None else ticket.noise
        noise = noise.to(model.device, torch.float32)
        solver = SOLVERS[ticket.solver](noise, time_grid(ticket.steps))
        x, t = next(solver)
        return _Row(ticket, text, null, solver, x, t, ticket.routing.k if ticket.routing.kind == "expert" else None)

    def _advance(self, rows: list[_Row], after: Callable[[Tensor], Tensor] | None) -> None:
        """One evaluation and one step of each row."""
        available = self.experts.available()
        rows = self._possible(rows, available)
        if not rows:
            return
        weights = self._weights(rows, torch.tensor(available))
        x, t = self._states(rows)
        cond = Conditioning(
            torch.stack([row.text.states for row in rows]),
            torch.stack([row.text.pooled for row in rows]),
            torch.stack([row.null.states for row in rows]),
            torch.tensor([guidance_at(row.t, row.ticket.guidance, row.ticket.request.guidance_interval) for row in rows], device=x.device),
            tuple(f"{row.text.digest}:{row.null.digest}" for row in rows),
        )
        try:
            v = ensemble_velocity(x, t, cond, self.experts, weights.to(x.device))
        except ExpertError as error:
            self._setback(rows, weights, error)
            return
        with self._changed:
            self._counts["evaluations"] += len(rows)
            self._expert_rows = [a + b for a, b in zip(self._expert_rows, (weights != 0).sum(0).tolist(), strict=True)]
        looks, ended = [], []
        for n, row in enumerate(rows):
            row.history.append({"t": row.t, "weights": weights[n].tolist()})
            done, total = len(row.history), evaluations(row.ticket.solver, row.ticket.steps)
            if row.ticket.preview is not None and done % row.ticket.preview_every == 0 and done < total:
                looks.append(_Look(row, row.ticket.preview, done, row.t, x0_from_velocity(x[n : n + 1], t[n : n + 1], v[n : n + 1])[0]))
            try:
                row.x, row.t = row.solver.send(v[n])
            except StopIteration as stop:
                row.x = stop.value
                ended.append(row)
        if after is not None:
            for row, state in zip(rows, after(torch.stack([row.x for row in rows])), strict=True):
                row.x.copy_(state)  # in place: at the end of a step, the solver goes on from this very tensor
        self._show(looks)
        self._finish(ended)

    # -- routing ------------------------------------------------------------------------------------------------------------

    def _possible(self, rows: list[_Row], available: list[bool]) -> list[_Row]:
        """The rows that the experts there can serve; the others fail."""
        possible = []
        there = ", ".join(str(k) for k, here in enumerate(available) if here) or "none"
        for row in rows:
            routing = row.ticket.routing
            if routing.kind == "expert" and not available[routing.k]:
                self._fail(row.ticket, ExpertError(routing.k, f"is not available, and routing {routing} allows no other; available: {there}"))
            elif not any(available):
                self._fail(row.ticket, RuntimeError("no expert is available"))
            else:
                possible.append(row)
        return possible

    def _weights(self, rows: list[_Row], available: Tensor) -> Tensor:
        """Weights of the experts, (N, K) on the CPU: one router pass over the rows that need it."""
        for row in rows:
            if row.ticket.routing.kind == "caption" and row.expert is not None and not available[row.expert]:
                row.expert = None  # the one drawn has gone: draw again
        undecided = [n for n, row in enumerate(rows) if row.expert is None]
        weights = torch.zeros(len(rows), self.model.num_experts)
        if undecided:
            logits = self._router([rows[n] for n in undecided])
        for n, logit in zip(undecided, logits.split(1) if undecided else (), strict=True):
            row, routing = rows[n], rows[n].ticket.routing
            row.masked.update((~available).nonzero().flatten().tolist())
            if routing.kind == "caption":
                row.expert = self._draw(row, routing_weights(logit, Routing("full"), available)[0])
            else:
                weights[n] = routing_weights(logit, routing, available)[0]
        for n, row in enumerate(rows):
            if row.expert is not None:
                weights[n, row.expert] = 1.0
        return weights

    def _router(self, rows: list[_Row]) -> Tensor:
        """Logits (N, K), on the CPU."""
        x, t = self._states(rows)
        count = padded(len(rows), x.device)
        pooled = pad_rows(torch.stack([row.text.pooled for row in rows]), count) if self.model.router_reads_text else None
        logits: Tensor = self.model.router(pad_rows(x, count), pad_rows(t, count), pooled)
        return logits[: len(rows)].float().cpu()

    def _states(self, rows: list[_Row]) -> tuple[Tensor, Tensor]:
        return torch.stack([row.x for row in rows]), torch.tensor([row.t for row in rows], device=self.model.device)

    @staticmethod
    def _draw(row: _Row, p: Tensor) -> int:
        """One expert from p(k | caption), the same whenever (seed, index) and p are."""
        u = rng.uniform(rng.key(row.ticket.request.seed, row.ticket.request.index), "caption-routing", np.array([0]))[0]
        cumulative = np.cumsum(p.double().numpy())
        return int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))

    def _setback(self, rows: list[_Row], weights: Tensor, error: ExpertError) -> None:
        """An expert failed: if it has gone, its rows are routed anew at the next tick; if it is still there, they fail.

        The other rows are where they were, and are stepped at the next tick.
        """
        gone = not self.experts.available()[error.expert]
        for row in (row for row, w in zip(rows, weights, strict=True) if w[error.expert] != 0):
            row.setbacks += 1
            # An expert that comes and goes must not hold a row for ever.
            if not gone or row.setbacks > self.model.num_experts:
                self._fail(row.ticket, error)

    # -- results ------------------------------------------------------------------------------------------------------------

    def _show(self, looks: list[_Look]) -> None:
        """Decode and deliver previews."""
        if not looks:
            return
        images = self.model.codec.decode(torch.stack([look.latent for look in looks]))
        for look, image in zip(looks, images, strict=True):
            ticket = look.row.ticket
            total = evaluations(ticket.solver, ticket.steps)
            try:
                look.show(Preview(image, look.evaluation, total, look.t))
            except Exception as error:
                self._fail(ticket, error)

    def _finish(self, ended: list[_Row]) -> None:
        """Decode finished rows and let them leave."""
        good = []
        for row in ended:
            if row.ticket.future.done():
                continue  # its preview failed just now
            if bool(torch.isfinite(row.x).all()):
                good.append(row)
            else:
                self._fail(row.ticket, ArithmeticError("the picture has values that are not finite; lower guidance_scale, or check the experts"))
        if not good:
            return
        latents = torch.stack([row.x for row in good])
        images = self.model.codec.decode(latents)
        now = time.monotonic()
        for row, latent, image in zip(good, latents.cpu().numpy(), images, strict=True):
            ticket = row.ticket
            if self._conclude(ticket, "finished"):
                seconds = now - ticket.submitted
                ticket.future.set_result(
                    ImageResult(image, ticket.request.seed, ticket.request.index, row.history, sorted(row.masked), seconds, latent)
                )

    def _fail(self, ticket: _Ticket, error: Exception) -> None:
        if not ticket.future.done() and self._conclude(ticket, "failed"):
            ticket.future.set_exception(error)

    def _conclude(self, ticket: _Ticket, count: str) -> bool:
        """Take a picture out; False if it was cancelled. Until here its future could be."""
        with self._changed:
            self._active = [row for row in self._active if row.ticket is not ticket]
            alive = ticket.future.set_running_or_notify_cancel()
            self._counts[count if alive else "cancelled"] += 1
        return alive

    def _drop_cancelled(self) -> None:
        with self._changed:
            self._forget_cancelled()
            for row in [row for row in self._active if row.ticket.future.cancelled()]:
                self._conclude(row.ticket, "cancelled")

    def _queued(self) -> int:
        return sum(len(queue) for queue in self._waiting.values())

    def _forget_cancelled(self) -> None:
        for client, queue in list(self._waiting.items()):
            for ticket in [ticket for ticket in queue if ticket.future.cancelled()]:
                queue.remove(ticket)
                self._conclude(ticket, "cancelled")
            if not queue:
                del self._waiting[client]


def generate(model: ParisModel | Engine, requests: Sequence[ImageRequest], max_resident: int | None = None) -> list[ImageResult]:
    """Draw pictures and wait for them, in the order of the requests.

    With a model, its experts are loaded on first use and stay with it for the next call; load the model anew when its files have changed.

    Args:
        model: the model, or an engine over it.
        requests: what to draw.
        max_resident: with a model, experts in memory at once; ``None`` is as many as fit.

    Raises:
        ValueError: a request is not valid.
        EngineFull: more requests than the given engine's queue takes.
    """
    engine = model if isinstance(model, Engine) else _engine_of(model, max_resident)
    futures: list[Future[ImageResult]] = []
    try:
        for request in requests:
            futures.append(engine.submit(request))
        if not engine.running:
            engine.run_until_idle()
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()  # of a call that was interrupted, so that the next one does not draw them


def _engine_of(model: ParisModel, max_resident: int | None) -> Engine:
    """The model's own engine, made anew when what its experts were made for has changed."""
    made_for = (max_resident, model.device, model.precision, tuple(model.present))
    if model.own_engine is None or model.own_engine[0] != made_for:
        model.own_engine = None  # its experts make room first
        experts = LocalExperts(model.expert_files(), lazy=True, max_resident=max_resident)
        # Without a circle of references, the experts leave memory as soon as the model does.
        model.own_engine = made_for, Engine(weakref.proxy(model), experts, max_queue=ANY_NUMBER)
    return model.own_engine[1]
