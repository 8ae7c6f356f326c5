"""What surrounds every request: an id, a limit on its headers, and an answer even when the code fails."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.metrics import ANSWERS, Report, ignore
from serve_app.protocol import IMAGES, ApiError

log = logging.getLogger("ray.serve")

MAX_HEADER_BYTES = 16 * 1024

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def internal_error(error: Exception, where: str, request_id: str) -> ApiError:
    """Log an error of ours, and what the client gets for it: where to find it, and no more."""
    log.error("internal error in request %s, %s", request_id, where, exc_info=error)
    return ApiError(500, f"Internal error; the server's log has it under {request_id}.", "server_error", code="internal_error")


class Envelope:
    """Outermost of the middlewares.

    The id is the client's ``x-request-id`` if it is a word of at most 128 letters, digits and ``._:-``, else a new one; it is in ``scope["state"]``.

    Args:
        app: the application.
        echo_ids: write the id into the answer; False where somebody else does, as Serve's proxy.
        report: where answers to requests for pictures are counted.
    """

    def __init__(self, app: ASGIApp, echo_ids: bool = True, report: Report = ignore):
        self.app, self.echo_ids, self.report = app, echo_ids, report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if scope["path"].endswith(IMAGES) and scope["method"] == "POST":
                    status = message["status"]
                    usual = "ok" if status < 400 else "client_left" if status == 499 else "error"
                    self.report(ANSWERS, 1, status=str(status), reason=scope["state"].get("reason") or usual)
                if self.echo_ids:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
                message = f"The headers are larger than this server's limit of {MAX_HEADER_BYTES} bytes; send fewer."
                error = ApiError(431, message, code="headers_too_large")
                scope["state"]["reason"] = error.code
                await JSONResponse(error.body(), 431)(scope, receive, with_id)
                return
            await self.app(scope, receive, with_id)
        except Exception as failure:
            error = internal_error(failure, f"{scope['method']} {scope['path']}", request_id)
            if started:
                raise  # too late for a status
            scope["state"]["reason"] = error.code
            await JSONResponse(error.body(), 500)(scope, receive, with_id)
