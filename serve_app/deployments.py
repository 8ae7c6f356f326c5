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
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from serve_app import metrics
from serve_app.limits import Limits
from serve_app.metrics import Report, to_ray
from serve_app.protocol import ApiError, Event, ExpertCard, Finished, Glimpse, Job, ModelCard, Outcome, Picture, Queued

if TYPE_CHECKING:
    import numpy as np
    from fastapi import FastAPI
    from numpy.typing import NDArray
    from ray.serve.handle import DeploymentHandle

    from paris_ray.inference.engine import ImageResult
    from serve_app.remote import Answer, WireCall

log = logging.getLogger("ray.serve")

WARM_SECONDS = 300.0
"""For how long a starting sampler waits for expert groups; it then serves with those that are there, and takes the others in as they come."""


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
        groups: the handles of the expert groups and what each is meant to hold; none places all experts here.
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
        groups: Sequence[tuple[tuple[int, ...], DeploymentHandle]] = (),
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
        from serve_app.measured import MeasuredEngine
        from serve_app.remote import RemoteExperts

        torch.set_num_threads(threads)
        self.model = load_model(model, _device(gpus), precision, compile=compile)
        present = self.model.present
        if groups:
            self.experts: LocalExperts | RemoteExperts = RemoteExperts(groups, self.model.num_experts)
            self.placed = [here and placed for here, placed in zip(present, self.experts.placed, strict=True)]
        else:
            self.experts = LocalExperts(self.model, threads=threads)
            self.placed = list(present)
        self.min_experts, self.report = min_experts, report
        self.engine = MeasuredEngine(self.model, self.experts, report, max_rows=max_rows, max_queue=max_queue)
        self.engine.start()
        self.created = int(time.time())
        self.seconds_per_picture = 1.0
        self.warm = False
        try:
            self._warm_up()
            self.engine.max_masked = max_masked_probability  # what warms up may be anything
        except BaseException:
            self.close()
            raise

    def _warm_up(self) -> None:
        """One forward pass of the router, the codec and of every placed expert that answers in time."""
        from paris_ray.inference.engine import ImageRequest

        if not any(self.placed):
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

    def _waiting_for(self) -> list[int]:
        return [k for k, (placed, here) in enumerate(zip(self.placed, self.experts.available(), strict=True)) if placed and not here]

    async def card(self) -> ModelCard:
        """The model, and the state of its experts now."""
        info, available = self.model.info, self.experts.available()
        experts = [
            ExpertCard(
                index=k,
                objective=spec["objective"],
                cluster_size=spec.get("cluster_size"),
                fingerprint=spec.get("fingerprint"),
                state="ready" if available[k] else "down" if self.placed[k] else "missing",
            )
            for k, spec in enumerate(info["experts"])
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
        )

    async def generate(self, job: Job) -> Outcome:
        """Make the pictures of a job; cancelling the await frees their places at the next step. Raises as :meth:`stream` does."""
        async with contextlib.aclosing(self.stream(job)) as events:
            done = [event async for event in events if isinstance(event, Finished)]
        return Outcome(
            tuple(sorted((event.picture for event in done), key=lambda picture: picture.index)),
            tuple(sorted({k for event in done for k in event.degraded})),
            {"sampler": round(max(event.seconds for event in done), 4)},
        )

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
                    futures.append(self._submit(job, index, tell))
                    self.report(metrics.ADMITTED, 1)
                yield Queued()
                for future in futures:
                    future.add_done_callback(tell)
                left = len(futures)
                while left:
                    news = await told.get()
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

    def _submit(self, job: Job, index: int, tell: Callable[[Glimpse], object]) -> Future[ImageResult]:
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
            return self.engine.submit(request, preview if job.previews else None, every)
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
        """Raises when the engine's thread has died, so that Serve replaces the replica."""
        if not self.engine.running:
            raise RuntimeError("the engine has stopped")
        for k, here in enumerate(self.experts.available()):
            self.report(metrics.READY, float(here), expert=str(k))

    def close(self) -> None:
        """Stop the threads."""
        self.engine.stop()
        close = getattr(self.experts, "close", None)
        if close is not None:
            close()


def preview_every(evaluations: int, previews: int) -> int:
    """Evaluations between previews, so that there are as many as were asked for before the end, evenly spread if that is possible."""
    return max(1, min(math.ceil(evaluations / (previews + 1)), (evaluations - 1) // max(previews, 1)))


def _picture(result: ImageResult) -> Picture:
    import numpy as np

    weights = np.array([step["weights"] for step in result.routing], np.float32)
    times = tuple(float(step["t"]) for step in result.routing)
    return Picture(result.image, result.index, times, weights, round(result.masked_probability, 6))


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
        import torch

        from paris_ray.inference.experts import LocalExperts
        from paris_ray.inference.weights import open_experts
        from serve_app.remote import RemoteCallee

        torch.set_num_threads(threads)
        files = open_experts(model, _device(gpus), precision, compile=compile)
        experts = LocalExperts(files, [k for k in indices if files.present[k]], threads=threads)
        self.callee = RemoteCallee(experts, files.device)
        self.callee.warm_up(files.latent_shape, (1, files.text_width))

    def loaded(self) -> list[int]:
        """Which of its experts can be called."""
        return self.callee.loaded()

    def velocities(self, calls: list[WireCall], texts: dict[str, NDArray[np.float32]]) -> Answer:
        """See :meth:`serve_app.remote.RemoteCallee.velocities`."""
        return self.callee.velocities(calls, texts)

    def pid(self) -> int:
        """The process, for operators and tests."""
        return os.getpid()


class HandleSampler:
    """The sampler behind a Serve handle, with Ray's errors turned into ours; see :class:`serve_app.api.SamplerClient`."""

    def __init__(self, handle: DeploymentHandle):
        self.handle = handle

    async def card(self) -> ModelCard:
        """See :meth:`Sampler.card`."""
        card: ModelCard = await self._call("card")
        return card

    async def generate(self, job: Job) -> Outcome:
        """See :meth:`Sampler.generate`."""
        outcome: Outcome = await self._call("generate", job)
        return outcome

    async def stream(self, job: Job) -> AsyncGenerator[Event, None]:
        """See :meth:`Sampler.stream`."""
        response, ended = self.handle.options(stream=True).stream.remote(job), False
        try:
            with _handle_errors():
                async for event in response:
                    yield event
            ended = True
        finally:
            if not ended:
                response.cancel()

    async def _call(self, method: str, *args: Any) -> Any:
        response = getattr(self.handle, method).remote(*args)
        try:
            with _handle_errors():
                return await response
        except asyncio.CancelledError:
            response.cancel()
            raise


@contextlib.contextmanager
def _handle_errors() -> Iterator[None]:
    from ray.exceptions import RayActorError, RayTaskError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, ApiError):
            raise error.cause from None
        raise
    except BackPressureError:
        raise ApiError(429, "The server is busy; try again.", "rate_limit_error", code="queue_full", retry_after=5) from None
    except (RayActorError, DeploymentUnavailableError):
        raise ApiError(503, "The sampler's process is being replaced; try again.", "server_error", code="not_ready", retry_after=10) from None


class Api:
    """The HTTP ingress; see :func:`serve_app.api.create_app`.

    Args:
        sampler: handle of the sampler.
        limits: what one request may ask for.
        key_digests: digests of the API keys; none serves without keys.
    """

    def __init__(self, sampler: DeploymentHandle, limits: Limits, key_digests: frozenset[bytes] = frozenset()):
        self.sampler, self.limits, self.key_digests = HandleSampler(sampler), limits, key_digests

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this once in the replica."""
        from serve_app.api import create_app

        return create_app(self.sampler, self.limits, self.key_digests, echo_ids=False, report=to_ray)
