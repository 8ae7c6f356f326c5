"""The sampling engine: many pictures at once, each at its own step, solver, guidance and routing.

One :meth:`Engine.tick` is one velocity for every active row: one router pass over all of them, one call per expert that has rows, one step of each
row's own solver. Finished rows leave and waiting ones join at every tick, so no request waits for another's end. Where the experts live is not the
engine's business (:class:`paris_ray.diffusion.ensemble.Experts`).
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paris_ray.diffusion.ensemble import Experts, ensemble_velocity, one_expert, upload
from paris_ray.diffusion.path import x0_from_velocity
from paris_ray.diffusion.routing import Routing
from paris_ray.diffusion.sampler import SOLVERS, initial_noise, time_grid
from paris_ray.inference.delivery import Look, finish, show
from paris_ray.inference.experts import ExpertError, LocalExperts
from paris_ray.inference.prompts import Prompts
from paris_ray.inference.request import EngineFull, EngineStopped, ImageRequest, ImageResult, Preview, TooDegraded, validate
from paris_ray.inference.rows import Row, Ticket, conditioning
from paris_ray.inference.waiting import Waiting
from paris_ray.inference.weighing import Weigher

if TYPE_CHECKING:
    from paris_ray.inference.weights import ParisModel

__all__ = ["ANY_NUMBER", "Engine", "EngineFull", "EngineStopped", "ImageRequest", "ImageResult", "Preview", "TooDegraded", "generate"]

ANY_NUMBER = 1 << 20
"""A queue for callers who wait for all that they submit."""


class Engine:
    """Step-level batching over any :class:`Experts`.

    :meth:`submit`, cancellation and :attr:`metrics` may come from any thread. Ticks of several threads take turns; who needs a row of them without
    another's in between holds :attr:`driving`.

    Args:
        model: router, codec, text encoder, null text and defaults.
        experts: where velocities come from.
        max_rows: pictures stepped at once.
        max_queue: pictures that may wait.
        max_masked: the probability that the router may give to missing experts; a picture of which more would be lost fails with TooDegraded.
    """

    def __init__(self, model: ParisModel, experts: Experts, max_rows: int = 64, max_queue: int = 256, max_masked: float = 1.0):
        if max_rows < 1 or max_queue < 1:
            raise ValueError(f"max_rows {max_rows} and max_queue {max_queue} must be at least 1")
        self.model, self.experts, self.max_rows, self.max_queue = model, experts, max_rows, max_queue
        self.max_masked = max_masked
        self._waiting = Waiting(max_queue)
        self._active: list[Row] = []
        self._prompts = Prompts(model)
        self._weigher = Weigher(model)
        self.driving = threading.RLock()
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
        together: int = 1,
    ) -> Future[ImageResult]:
        """Queue a picture.

        Args:
            request: what to draw.
            preview: called from the engine's thread every ``preview_every`` evaluations.
            preview_every: evaluations between previews.
            noise: to start from instead of the seed's, (C, H, W).
            together: of the first of several pictures, how many are to follow at once with it; it is refused unless there is room for all.

        Returns:
            a future. Its ``cancel()`` works until the picture is done and frees the row at the next tick.

        Raises:
            ValueError: the request is not valid.
            EngineFull: ``max_queue`` pictures wait already, or of several clients this one's share of them.
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
            try:
                self._waiting.add(ticket, together)
            except EngineFull:
                self._counts["rejected"] += 1
                raise
            self._changed.notify_all()
        return ticket.future

    def _ticket(self, request: ImageRequest, noise: Tensor | None, preview: Callable[[Preview], None] | None, preview_every: int) -> Ticket:
        steps, guidance, solver, routing = request.steps, request.guidance_scale, request.solver, request.routing
        if steps is None or guidance is None or solver is None or routing is None:
            raise ValueError("steps, guidance_scale, solver and routing: the model has no default for one of them; give all four")
        parsed = Routing.parse(routing, self.model.num_experts)
        return Ticket(request, steps, float(guidance), solver, parsed, Future(), noise, preview, preview_every, time.monotonic())

    def ahead(self, future: Future[ImageResult]) -> int | None:
        """How many pictures get their place before this one, as things stand; None when it has one, or is done."""
        with self._changed:
            return self._waiting.ahead(future)

    @property
    def metrics(self) -> dict[str, Any]:
        """Counters since the start, and what waits and runs now."""
        with self._changed:
            return {**self._counts, "queued": len(self._waiting), "active": len(self._active), "rows_per_expert": list(self._expert_rows)}

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
            tickets = [*(row.ticket for row in self._active), *self._waiting.clear()]
            self._active = []
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
        with self.driving:  # of two threads, one draws the other's pictures too
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
        with self.driving:
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
        finish(list(self._active), self.model.codec, self._conclude, self._fail)

    def _admit(self) -> None:
        with self._changed:
            tickets = self._waiting.take(self.max_rows - len(self._active))
        self._prompts.prepare(prompt for ticket in tickets for prompt in (ticket.request.prompt, ticket.request.negative_prompt))
        for ticket in tickets:
            try:
                row = self._begin(ticket)
            except Exception as error:
                self._fail(ticket, error)
                continue
            with self._changed:
                self._active.append(row)

    def _begin(self, ticket: Ticket) -> Row:
        request, model, routing = ticket.request, self.model, ticket.routing
        text, null = self._prompts(request.prompt), self._prompts(request.negative_prompt)
        noise = initial_noise(request.seed, request.index, model.latent_shape) if ticket.noise is None else ticket.noise
        noise = upload(noise.float(), model.device)
        solver = SOLVERS[ticket.solver](noise, time_grid(ticket.steps, ticket.solver))
        x, t = next(solver)
        weights = one_expert([routing.k], torch.ones(model.num_experts, dtype=torch.bool))[0] if routing.kind == "expert" else None
        return Row(ticket, text, null, solver, x, t, weights)

    def _advance(self, rows: list[Row], after: Callable[[Tensor], Tensor] | None) -> None:
        """One evaluation and one step of each row. Between the router's answer and the pictures' end nothing here waits for the device."""
        available = self.experts.available()
        rows = self._possible(rows, available)
        if not rows:
            return
        x = torch.stack([row.x for row in rows])  # (N, C, H, W)
        t = upload(torch.tensor([row.t for row in rows]), x.device)  # (N,)
        cond = conditioning(rows)
        weights = self._weigher.weights(rows, x, t, available)
        if self._too_degraded(rows, available):
            return
        try:
            v = ensemble_velocity(x, t, cond, self.experts, weights)
        except ExpertError as error:
            self._setback(rows, weights, error)
            return
        with self._changed:
            self._counts["evaluations"] += len(rows)
            self._expert_rows = [a + b for a, b in zip(self._expert_rows, (weights != 0).sum(0).tolist(), strict=True)]
        versions = self.experts.versions  # of experts that may change meanwhile
        looks, ended = [], []
        for n, row in enumerate(rows):
            row.note(weights[n], versions)
            row.history.append({"t": row.t, "weights": weights[n].tolist()})
            if row.looked_at:
                looks.append(Look(row.ticket, len(row.history), row.t, x0_from_velocity(x[n : n + 1], t[n : n + 1], v[n : n + 1])[0]))
            try:
                row.x, row.t = row.solver.send(v[n])
            except StopIteration as stop:
                row.x = stop.value
                ended.append(row)
        if after is not None:
            reached = torch.stack([row.x for row in rows])
            if (wanted := after(reached)) is not reached:
                for row, state in zip(rows, wanted, strict=True):
                    row.x.copy_(state)  # in place: at the end of a step, the solver goes on from this very tensor
        show(looks, self.model.codec, self._fail)
        finish(ended, self.model.codec, self._conclude, self._fail)

    # -- routing ------------------------------------------------------------------------------------------------------------

    def _possible(self, rows: list[Row], available: list[bool]) -> list[Row]:
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

    def _too_degraded(self, rows: list[Row], available: list[bool]) -> bool:
        """Whether some rows have lost more than may be, and failed; the others are where they were, and are stepped at the next tick."""
        bad = [row for row in rows if row.masked_probability > self.max_masked]
        missing = ", ".join(str(k) for k, here in enumerate(available) if not here)
        for row in bad:
            share = f"the router gives them {row.masked_probability:.1%} of this picture at t = {row.t:.3g}"
            self._fail(row.ticket, TooDegraded(f"experts {missing} are not available, and {share}, above the limit of {self.max_masked:.1%}"))
        return bool(bad)

    def _setback(self, rows: list[Row], weights: Tensor, error: ExpertError) -> None:
        """An expert failed: if it has gone, its rows are routed anew at the next tick; if it is still there, they fail.

        The other rows are where they were, and are stepped at the next tick.
        """
        gone = not self.experts.available()[error.expert]
        for row in (row for row, w in zip(rows, weights, strict=True) if w[error.expert] != 0):
            row.setbacks += 1
            # An expert that comes and goes must not hold a row for ever.
            if not gone or row.setbacks > self.model.num_experts:
                self._fail(row.ticket, error)

    # -- the end ------------------------------------------------------------------------------------------------------------

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        if not ticket.future.done() and self._conclude(ticket, "failed"):
            ticket.future.set_exception(error)

    def _conclude(self, ticket: Ticket, count: str) -> bool:
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

    def _forget_cancelled(self) -> None:
        for ticket in self._waiting.drop_cancelled():
            self._conclude(ticket, "cancelled")


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


_MAKING = threading.Lock()


def _engine_of(model: ParisModel, max_resident: int | None) -> Engine:
    """The model's own engine, made anew when what its experts were made for has changed."""
    made_for = (max_resident, model.device, model.precision, model.compile, tuple(model.present))
    with _MAKING:  # of two threads' first calls, one makes it
        if model.own_engine is None or model.own_engine[0] != made_for:
            model.own_engine = None  # its experts make room first
            experts = LocalExperts(model.expert_files(), lazy=True, max_resident=max_resident)
            # Without a circle of references, the experts leave memory as soon as the model does.
            model.own_engine = made_for, Engine(weakref.proxy(model), experts, max_queue=ANY_NUMBER)
        return model.own_engine[1]
