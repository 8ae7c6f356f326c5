"""The connection to a client: bodies counted as they come, work that ends when the client leaves, server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve_app.protocol import MAX_BODY_BYTES, ApiError

T = TypeVar("T")

HEARTBEAT_SECONDS = 15.0
"""After so long without an event a comment goes out: what lies between takes a silent connection for a dead one."""


BODY_SECONDS = 20.0
"""A body has come within so long, or is not waited for: whoever sends a byte now and then must not hold a connection for ever."""


async def read_body(request: Request) -> bytes:
    """The body, counted as it comes: a Content-Length may be absent or wrong.

    Raises:
        ApiError: status 413; 408 when it does not come in time.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _whole_body(request)
    except TimeoutError:
        message = f"The body had not come after {BODY_SECONDS:g} s, this server's limit; send it at once."
        raise ApiError(408, message, code="body_too_slow") from None


async def _whole_body(request: Request) -> bytes:
    too_large = ApiError(413, f"The body is larger than this server's limit of {MAX_BODY_BYTES} bytes; shorten the prompt.", code="body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 12 or int(declared) > MAX_BODY_BYTES):
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise too_large
    return bytes(body)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Future[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """The result of the work, or None when the client went away first; then, or when this await is cancelled, the work is cancelled."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        await _end(leaving)
        await _end(working)


def server_sent(kind: str, data: dict[str, Any]) -> bytes:
    """One server-sent event; its type is in the data, too, where OpenAI's clients look for it."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()


class EventStream(Response):
    """Server-sent events, until there are no more or the client leaves.

    Args:
        events: as bytes; closed at the end.
        headers: of the answer.
        ended: called after that, whatever the end was.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], headers: dict[str, str], ended: Callable[[], Awaitable[None]]):
        # Without no-transform and the last header, what lies between may keep events back to compress or collect them.
        super().__init__(None, 200, {**headers, "cache-control": "no-store, no-transform", "x-accel-buffering": "no"}, "text/event-stream")
        del self.headers["content-length"]
        self.events, self.ended = events, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        leaving = asyncio.ensure_future(_gone(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while (event := await self._next(leaving, send)) is not None:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            if not leaving.done():
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            pass  # the client left while it was sent something
        finally:
            await _end(leaving)
            await self.events.aclose()
            await self.ended()

    async def _next(self, leaving: asyncio.Future[None], send: Send) -> bytes | None:
        async def take() -> bytes | None:
            return await anext(self.events, None)

        coming = asyncio.ensure_future(take())
        either: set[asyncio.Future[Any]] = {coming, leaving}
        try:
            while not leaving.done():
                await asyncio.wait(either, timeout=HEARTBEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if coming.done():
                    return coming.result()
                if not leaving.done():
                    await send({"type": "http.response.body", "body": b": still working\n\n", "more_body": True})
            return None
        finally:
            await _end(coming)
