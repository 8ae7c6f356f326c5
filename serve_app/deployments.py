"""The replicas: what runs in which process. Torch is imported when a replica that needs it starts; the HTTP process never does.

Api (HTTP) ─▶ Sampler (router, text encoder, codec, engine) ─▶ ExpertGroup … (placement ``together``: none, the experts are in the sampler)
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from serve_app import metrics
from serve_app.cards import ExpertCard, ExpertState, ModelCard
from serve_app.metrics import Report, to_ray
from serve_app.protocol import ApiError
from serve_app.work import Event, Finished, Glimpse, Job, Outcome, Picture, Queued, outcome

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from ray.serve.handle import DeploymentHandle

    from paris_ray.inference.engine import ImageResult
    from serve_app.remote import Answer, WireCall

log = logging.getLogger("ray.serve")

WARM_SECONDS = 300.0
"""For how long a starting sampler waits for expert groups; it then serves with those that are there, and takes the others in as they come."""
STUCK_SECONDS = 180.0
"""A sampler with pictures to make that has not made a step for so long is replaced."""
QUEUE_SECONDS = 0.5
"""How often those who wait are told of their place."""


def _device(gpus: float) -> str:
    """The device of a replica that was given GPUs; none without one, rather than a silent crawl on the CPU."""
    import torch

    if gpus and not torch.cuda.is_available():
        raise RuntimeError(f"gpus: {gpus:g} were asked for and torch finds none in this process; set gpus=0, or install torch for this GPU")
    return "cuda" if gpus else "cpu"


class Sampler:
    """Makes pictures: router, text encoder, codec and the batching engine, and the experts themselves when they are placed together with it.

    Args:
        model: folder or URI of the model.
        groups: what each expert group is meant to hold, its handle, and how many replicas it may have; none places all experts here.
        threads: CPU threads of this process.
        gpus: GPUs that this replica was given.
        precision: of the experts, ``fp32``, ``bf16`` or ``int8``.
        compile: compile the networks' blocks.
        max_rows: pictures stepped at once.
        max_queue: pictures that may wait.
        min_experts: with fewer there, requests are refused.
        max_masked_probability: the most that the router may give to missing experts.
        report: where what is measured goes.
    """

    def __init__(
        self,
        model: str,
        groups: Sequence[tuple[tuple[int, ...], DeploymentHandle, int]] = (),
        threads: int = 1,
        gpus: float = 0.0,
        precision: str = "fp32",
        compile: bool = False,
        max_rows: int = 64,
        max_queue: int = 256,
        min_experts: int = 1,
        max_masked_probability: float = 1.0,
        report: Report = to_ray,
    ):
        import torch

        from paris_ray.inference.experts import LocalExperts
        from paris_ray.inference.weights import load_model
        from serve_app.keeper import Keeper
        from serve_app.measured import MeasuredEngine
        from serve_app.remote import RemoteExperts

        torch.set_num_threads(threads)
        device = _device(gpus)
        self.model = load_model(model, device, precision, compile=compile)
        self.keeper: Keeper | None = None
        if groups:
            self.experts: LocalExperts | RemoteExperts = RemoteExperts(groups, self.model.num_experts)
        else:
            self.keeper = Keeper(model, None, device, precision, compile, threads)
            self.experts = self.keeper.experts
        self.min_experts, self.report = min_experts, report
        self.engine = MeasuredEngine(self.model, self.experts, report, max_rows=max_rows, max_queue=max_queue)
        self.engine.start()
        self.created = int(time.time())
        self.name = uuid.uuid4().hex[:8]  # the one whose load is told
        self.seconds_per_picture = 1.0
        self.warm = False
        self._progress = (-1, 0.0)
        try:
            self._warm_up()
            self.engine.max_masked = max_masked_probability  # what warms up may be anything
        except BaseException:
            self.close()
            raise

    def _warm_up(self) -> None:
        """One forward pass of the router, the codec and of every placed expert that answers in time."""
        from paris_ray.inference.engine import ImageRequest

        if not any(self.model.present):
            raise FileNotFoundError(f"{self.model.folder.uri} has no expert with weights; assemble the model when at least one is trained")
        deadline = time.monotonic() + WARM_SECONDS
        while self._waiting_for() and time.monotonic() < deadline:
            time.sleep(0.05)
        if late := self._waiting_for():
            log.warning("experts %s did not answer within %g s; serving without them until they do", late, WARM_SECONDS)
        there = [k for k, here in enumerate(self.experts.available()) if here]
        strategies = [f"expert-{k}" for k in there] + ["full"]
        futures = [self.engine.submit(ImageRequest("warm-up", steps=1, guidance_scale=2.0, routing=r, solver="euler")) for r in strategies]
        for future in futures:
            future.result(timeout=WARM_SECONDS)
        self.warm = True

    def _states(self) -> list[ExpertState]:
        return self.keeper.states() if self.keeper else self.experts.states()  # type: ignore[union-attr]

    def _waiting_for(self) -> list[int]:
        return [state.index for state in self._states() if state.state == "loading"]

    def reconfigure(self, user_config: Any) -> None:
        """What Serve calls with the deployment's ``user_config``: see :class:`serve_app.keeper.Changes`."""
        if self.keeper:
            self.keeper.reconfigure(user_config)
        elif user_config:
            log.error("the sampler has no experts to change; give user_config to the deployment ExpertGroup-N that has them")

    async def card(self) -> ModelCard:
        """The model, and the state of its experts now."""
        info, counts = self.model.info, self.engine.metrics
        experts = [
            ExpertCard(
                index=state.index,
                objective=state.objective or spec["objective"],
                cluster_size=spec.get("cluster_size"),
                fingerprint=state.fingerprint or spec.get("fingerprint"),
                state=state.state,
                reason=state.reason,
                rows=rows,
            )
            for state, spec, rows in zip(self._states(), info["experts"], counts["rows_per_expert"], strict=True)
        ]
        sampling = {name: self.model.defaults[name] for name in ("steps", "guidance_scale", "routing", "solver")}
        return ModelCard(
            id=info["name"],
            created=self.created,
            fingerprint=info.get("model_fingerprint"),
            image_size=self.model.image_size,
            experts=experts,
            sampling=sampling,
            router_reads_text=self.model.router_reads_text,
            attribution=info.get("attribution"),
            warm=self.warm,
            min_experts=self.min_experts,
            queued=counts["queued"],
            active=counts["active"],
            sampler=self.name,
        )

    async def generate(self, job: Job) -> Outcome:
        """Make the pictures of a job; cancelling the await frees their places at the next step. Raises as :meth:`stream` does."""
        async with contextlib.aclosing(self.stream(job)) as events:
            return outcome([event async for event in events if isinstance(event, Finished)])

    async def stream(self, job: Job) -> AsyncGenerator[Event, None]:
        """Make the pictures of a job and tell of them as they come; closing it frees their places at the next step.

        Raises:
            ApiError: 400 for what the model cannot do, 429 when the queue is full, 503 when no expert can be asked.
        """
        from serve_app.measured import tell_of_picture

        self._check_experts()
        futures: list[Future[ImageResult]] = []
        try:
            with self._api_errors(job):
                told: asyncio.Queue[Glimpse | Future[ImageResult]] = asyncio.Queue()
                loop = asyncio.get_running_loop()

                def tell(news: Glimpse | Future[ImageResult]) -> None:
                    loop.call_soon_threadsafe(told.put_nowait, news)

                for index in range(job.index, job.index + job.n):
                    futures.append(self._submit(job, index, tell, together=1 if futures else job.n))
                    self.report(metrics.ADMITTED, 1)
                ahead = self.engine.ahead(futures[0])
                yield Queued(ahead or 0)
                for future in futures:
                    future.add_done_callback(tell)
                left = len(futures)
                while left:
                    try:
                        news = await asyncio.wait_for(told.get(), QUEUE_SECONDS if ahead else None)
                    except TimeoutError:
                        if (now := self.engine.ahead(futures[0])) != ahead:
                            yield Queued(now or 0)
                        ahead = now
                        continue
                    if isinstance(news, Glimpse):
                        yield news
                        continue
                    left -= 1
                    result = news.result()
                    tell_of_picture(self.report, result)
                    self.seconds_per_picture += 0.2 * (result.seconds - self.seconds_per_picture)
                    yield Finished(_picture(result), tuple(result.degraded), round(result.seconds, 4))
        finally:
            for future in futures:
                future.cancel()

    def _check_experts(self) -> None:
        available = self.experts.available()
        if 0 < sum(available) < self.min_experts:
            missing = ", ".join(str(k) for k, here in enumerate(available) if not here)
            message = f"Experts {missing} are not available; {sum(available)} are, and this server answers with {self.min_experts} or more."
            raise ApiError(503, f"{message} Try again.", "server_error", code="too_degraded", retry_after=10)

    def _submit(self, job: Job, index: int, tell: Callable[[Glimpse], object], together: int) -> Future[ImageResult]:
        from paris_ray.diffusion.solvers import evaluations
        from paris_ray.inference.engine import ImageRequest, Preview

        settings = (job.steps, job.guidance_scale, job.routing, job.solver, job.client, job.guidance_interval)
        request = ImageRequest(job.prompt, job.negative_prompt, job.seed, index, *settings)
        number = itertools.count()

        def preview(seen: Preview) -> None:
            if (this := next(number)) < job.previews:
                tell(Glimpse(seen.image, index, this))

        try:
            every = preview_every(evaluations(job.solver, job.steps), job.previews)
            return self.engine.submit(request, preview if job.previews else None, every, together=together)
        except ValueError as error:
            raise ApiError(400, f"{error}.", param=str(error).partition(":")[0], code="invalid_value") from None

    @contextlib.contextmanager
    def _api_errors(self, job: Job) -> Iterator[None]:
        """What went wrong in the engine, as the client gets it."""
        from paris_ray.inference.engine import EngineFull, EngineStopped, TooDegraded
        from paris_ray.inference.experts import ExpertError

        try:
            yield
        except EngineFull as error:
            wait = max(1, min(60, math.ceil(self.seconds_per_picture)))
            raise ApiError(429, f"The server is busy: {error}.", "rate_limit_error", code="queue_full", retry_after=wait) from None
        except EngineStopped:
            raise ApiError(503, "The server is stopping; try again.", "server_error", code="stopping", retry_after=10) from None
        except TooDegraded as error:
            raise ApiError(503, f"Too much is missing: {error}; try again.", "server_error", code="too_degraded", retry_after=10) from None
        except ArithmeticError as error:
            log.error("a picture failed", exc_info=error)
            raise ApiError(500, f"{error}.", "server_error", code="not_finite") from None
        except ExpertError as error:
            log.error("a picture failed", exc_info=error)
            where = "routing" if job.routing.startswith("expert-") else None
            raise ApiError(503, f"An expert could not answer: {error}.", "server_error", where, "expert_unavailable", retry_after=5) from None
        except RuntimeError:
            if any(self.experts.available()):
                raise
            raise ApiError(503, "No expert is available; try again.", "server_error", code="expert_unavailable", retry_after=5) from None

    def check_health(self) -> None:
        """Raises when the engine's thread has died or is stuck, or when an idle model does not compute; Serve then replaces the replica."""
        if not self.engine.running:
            raise RuntimeError("the engine has stopped")
        counts, now = self.engine.metrics, time.monotonic()
        if not counts["active"] + counts["queued"]:
            self._try_router()
        elif self._progress[0] != counts["ticks"]:
            self._progress = counts["ticks"], now
        elif now - self._progress[1] > STUCK_SECONDS:
            raise RuntimeError(f"the engine has not made a step for {STUCK_SECONDS:g} s")
        if self.keeper:
            self.keeper.check()
        for k, here in enumerate(self.experts.available()):
            self.report(metrics.READY, float(here), expert=str(k))

    def _try_router(self) -> None:
        """One forward pass. Raises what it raises, and ArithmeticError when its answer is not finite."""
        import torch

        self._progress = (-1, 0.0)
        model = self.model
        with torch.inference_mode():
            zeros, text = (
                torch.zeros(1, *model.latent_shape, device=model.device),
                torch.zeros(1, model.router.text_embed_dim or 0, device=model.device),
            )
            logits = model.router(zeros, torch.full((1,), 0.5, device=model.device), text if model.router_reads_text else None)
        if not bool(torch.isfinite(logits).all()):
            raise ArithmeticError("the router's answer is not finite")

    def close(self) -> None:
        """Stop the threads."""
        self.engine.stop()
        (self.keeper or self.experts).close()  # type: ignore[union-attr]


def preview_every(evaluations: int, previews: int) -> int:
    """Evaluations between previews, so that there are as many as were asked for before the end, evenly spread if that is possible."""
    return max(1, min(math.ceil(evaluations / (previews + 1)), (evaluations - 1) // max(previews, 1)))


def _picture(result: ImageResult) -> Picture:
    import numpy as np

    weights = np.array([step["weights"] for step in result.routing], np.float32)
    times = tuple(float(step["t"]) for step in result.routing)
    return Picture(result.image, result.index, times, weights, round(result.masked_probability, 6), result.versions)


class ExpertGroup:
    """Some experts in one process, each of which has run once before the replica counts as started.

    Args:
        model: folder or URI of the model.
        indices: which experts.
        threads: CPU threads of this process.
        gpus: GPUs that this replica was given.
        precision: of the experts, ``fp32``, ``bf16`` or ``int8``.
        compile: compile the networks' blocks.
    """

    def __init__(self, model: str, indices: Sequence[int], threads: int = 1, gpus: float = 0.0, precision: str = "fp32", compile: bool = False):
        from serve_app.keeper import Keeper
        from serve_app.remote import RemoteCallee

        self.keeper = Keeper(model, indices, _device(gpus), precision, compile, threads)
        self.callee = RemoteCallee(self.keeper.experts, self.keeper.files.device)

    def states(self) -> list[ExpertState]:
        """See :meth:`serve_app.keeper.Keeper.states`."""
        return self.keeper.states()

    def reconfigure(self, user_config: Any) -> None:
        """What Serve calls with the deployment's ``user_config``: see :class:`serve_app.keeper.Changes`."""
        self.keeper.reconfigure(user_config)

    def check_health(self) -> None:
        """Raises when an expert does not compute; Serve then replaces the replica."""
        self.keeper.check()

    def velocities(self, calls: list[WireCall], texts: dict[str, NDArray[np.float32]]) -> Answer:
        """See :meth:`serve_app.remote.RemoteCallee.velocities`."""
        return self.callee.velocities(calls, texts)

    def pid(self) -> int:
        """The process, for operators and tests."""
        return os.getpid()
