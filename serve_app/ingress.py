"""The ingress's side of Serve: the sampler behind a handle, and the HTTP face as a deployment. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING

from paris_ray.storage import Folder
from serve_app.cards import ModelCard
from serve_app.limits import Limits
from serve_app.metrics import to_ray
from serve_app.protocol import ApiError
from serve_app.work import Event, Finished, Glimpse, Job, Outcome, outcome

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve.handle import DeploymentHandle

log = logging.getLogger("ray.serve")

RECOVERY_SECONDS = 60.0
"""For how long a request waits for a sampler that takes it: the next one, if it had one that died."""
FULL_SECONDS, MOST_FULL_SECONDS = 0.2, 2.0
"""Pause before a job whose sampler died asks the next one's full queue again; twice as long each time, up to the second."""


class SamplerDied(ApiError):
    """The process that made a job's pictures has gone."""

    def __init__(self) -> None:
        super().__init__(503, "The sampler's process is being replaced; try again.", "server_error", code="not_ready", retry_after=10)


class HandleSampler:
    """The sampler behind a Serve handle, with Ray's errors turned into ours; see :class:`serve_app.api.SamplerClient`.

    A job whose sampler dies is made again by the next one, once: the same seed gives the same bytes. What was told of it is not told twice.
    """

    def __init__(self, handle: DeploymentHandle):
        self.handle = handle

    async def card(self) -> ModelCard:
        """See :meth:`serve_app.deployments.Sampler.card`."""
        response = self.handle.card.remote()
        try:
            with _handle_errors():
                card: ModelCard = await response
                return card
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def generate(self, job: Job) -> Outcome:
        """Make the pictures of a job; cancelling the await cancels the work. Raises as :meth:`stream` does."""
        async with contextlib.aclosing(self.stream(job)) as events:
            return outcome([event async for event in events if isinstance(event, Finished)])

    async def stream(self, job: Job) -> AsyncGenerator[Event, None]:
        """See :meth:`serve_app.deployments.Sampler.stream`. Raises SamplerDied when the second one died, too, or did not come in time."""
        told: set[tuple[int, ...]] = set()
        now = asyncio.get_running_loop().time
        deadline, pause = None, FULL_SECONDS
        while True:
            try:
                async with contextlib.aclosing(self._events(job)) as events:
                    async for event in events:
                        if _unheard(event, told):
                            yield event
                return
            except SamplerDied:
                if deadline is not None:
                    raise
                log.warning("the sampler died with a job of %d pictures, which the next one makes again", job.n)
                await self._next_sampler()
                deadline = now() + RECOVERY_SECONDS
            except ApiError as error:
                # All that had a place come to the next one at once, and find that its queue has fewer than queue and sampler had.
                if deadline is None or error.code != "queue_full" or now() + pause > deadline:
                    raise
                await asyncio.sleep(pause)
                pause = min(2 * pause, MOST_FULL_SECONDS)

    async def _next_sampler(self) -> None:
        try:
            async with asyncio.timeout(RECOVERY_SECONDS):
                while True:
                    with contextlib.suppress(SamplerDied):
                        await self.card()
                        return
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise SamplerDied from None

    async def _events(self, job: Job) -> AsyncGenerator[Event, None]:
        response, ended = self.handle.options(stream=True).stream.remote(job), False
        try:
            with _handle_errors():
                try:
                    yield await asyncio.wait_for(anext(response), RECOVERY_SECONDS)
                except TimeoutError:
                    raise SamplerDied from None
                async for event in response:
                    yield event
            ended = True
        finally:
            if not ended:
                response.cancel()


def _unheard(event: Event, told: set[tuple[int, ...]]) -> bool:
    """Whether it has not been told; it is from now on. News of the queue are news each time."""
    if isinstance(event, Glimpse):
        name: tuple[int, ...] = (event.index, event.number)
    elif isinstance(event, Finished):
        name = (event.picture.index,)
    else:
        return True
    new = name not in told
    told.add(name)
    return new


@contextlib.contextmanager
def _handle_errors() -> Iterator[None]:
    from ray.exceptions import RayActorError, RayTaskError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, ApiError):
            raise error.cause from None
        if isinstance(error.cause, RayActorError):
            raise SamplerDied from None
        raise
    except BackPressureError:
        raise ApiError(429, "The server is busy; try again.", "rate_limit_error", code="queue_full", retry_after=5) from None
    except (RayActorError, DeploymentUnavailableError):
        raise SamplerDied from None


class Api:
    """The HTTP ingress; see :func:`serve_app.api.create_app`.

    Args:
        sampler: handle of the sampler.
        limits: what one request may ask for.
        key_digests: digests of the API keys; none serves without keys.
        clusters: folder or URI with the clusters' contact sheets, if it is to show them.
    """

    def __init__(self, sampler: DeploymentHandle, limits: Limits, key_digests: frozenset[bytes] = frozenset(), clusters: str | None = None):
        self.sampler, self.limits, self.key_digests = HandleSampler(sampler), limits, key_digests
        self.clusters = Folder(clusters) if clusters else None

    def _sheet(self, k: int) -> bytes | None:
        name = f"contact-{k}.png"
        return self.clusters.read_bytes(name) if self.clusters and self.clusters.exists(name) else None

    def _has_sheets(self) -> bool:
        try:
            return self._sheet(0) is not None
        except OSError as error:  # a decoration, which nobody waits for
            log.warning("no contact sheets: %s", error)
            return False

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this once in the replica."""
        from serve_app.api import create_app

        sheet = self._sheet if self._has_sheets() else None
        return create_app(self.sampler, self.limits, self.key_digests, echo_ids=False, report=to_ray, sheet=sheet)
