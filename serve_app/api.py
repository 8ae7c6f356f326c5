"""The HTTP face: checks, limits, keys, errors of one shape. Imports neither torch nor Ray; the sampler behind it may be anywhere."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Request
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve_app.cards import ModelCard
from serve_app.envelope import Envelope
from serve_app.events import openai_events
from serve_app.keys import Keys
from serve_app.limits import Limits
from serve_app.metrics import Report, ignore
from serve_app.pictures import encode
from serve_app.protocol import IMAGES, ApiError, ErrorAnswer, GeneratedImage, GenerationRequest, GenerationResponse, parse_request, resolve
from serve_app.transport import EventStream, read_body, unless_gone
from serve_app.turns import Turns
from serve_app.work import Event, Job, Outcome

CARD_SECONDS = 5.0
"""For how long a known model card is good enough to check requests against."""
OLD_CARD_SECONDS = 1.0
"""For how long a newer one is waited for, when there is an old one."""

STATIC = Path(__file__).parent / "static"

PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; img-src 'self' data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class SamplerClient(Protocol):
    """The sampler as the API sees it: the object itself, or a handle to it."""

    async def card(self) -> ModelCard:
        """The model and the state of its experts now."""
        ...

    async def generate(self, job: Job) -> Outcome:
        """Make the pictures. Cancelling the await cancels the work. Raises ApiError."""
        ...

    def stream(self, job: Job) -> AsyncGenerator[Event, None]:
        """The same as it happens: first :class:`Queued`, then previews and pictures. Closing it cancels the work. Raises ApiError."""
        ...


def create_app(
    sampler: SamplerClient,
    limits: Limits | None = None,
    key_digests: frozenset[bytes] = frozenset(),
    patience: float = 10.0,
    echo_ids: bool = True,
    report: Report = ignore,
    sheet: Callable[[int], bytes | None] | None = None,
) -> FastAPI:
    """The application.

    Args:
        sampler: what makes the pictures.
        limits: what one request may ask for, and one client.
        key_digests: of the API keys; with any, every path but the page and the health checks needs one.
        patience: seconds to wait for the sampler to say what it holds before it counts as not there.
        echo_ids: answer with ``x-request-id``; False where Serve's proxy does.
        report: where what is measured goes.
        sheet: gives the contact sheet of an expert's cluster, a PNG, where there is one; none where there are no sheets at all.
    """
    limits = limits or Limits()
    turns = Turns(limits)
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorAnswer, "description": who} for status, who in (("4XX", "Refused."), ("5XX", "Failed, or not there just now."))
    }
    app = FastAPI(title="paris_ray", docs_url=None, redoc_url=None, redirect_slashes=False, responses=refusals)
    known: tuple[float, ModelCard] | None = None

    async def fresh_card(patience: float = patience) -> ModelCard:
        nonlocal known
        try:
            card = await asyncio.wait_for(sampler.card(), patience)
        except TimeoutError:
            message = "The model is still loading, or its process is being replaced; try again."
            raise ApiError(503, message, "server_error", code="not_ready", retry_after=10) from None
        known = (time.monotonic(), card)
        return card

    async def recent_card() -> ModelCard:
        if known is None:
            return await fresh_card()
        if time.monotonic() - known[0] > CARD_SECONDS:
            try:
                return await fresh_card(min(patience, OLD_CARD_SECONDS))
            except ApiError:
                pass  # the sampler is being replaced: the request waits for the next one, and an old card checks it as well
        return known[1]

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse((STATIC / "index.html").read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    @app.get("/experts", include_in_schema=False)
    async def experts_page() -> HTMLResponse:
        return HTMLResponse((STATIC / "experts.html").read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready", responses={503: {"description": "Not ready, and why.", "content": {"application/json": {}}}})
    async def ready() -> JSONResponse:
        try:
            card = await fresh_card()
        except ApiError as error:
            return JSONResponse({"status": "not ready", "reason": error.message}, 503)
        states = {str(expert.index): expert.state for expert in card.experts}
        good = card.warm and list(states.values()).count("ready") >= max(card.min_experts, 1)
        return JSONResponse({"status": "ready" if good else "not ready", "experts": states}, 200 if good else 503)

    def tell(card: ModelCard) -> dict[str, Any]:
        return {**_model(card), "limits": limits.model_dump(), "contact_sheets": sheet is not None}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [tell(await fresh_card())]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        card = await fresh_card()
        if model != card.id:
            raise ApiError(404, f"model: {model[:80]!r} is not served here; this server has {card.id!r}.", param="model", code="model_not_found")
        return tell(card)

    @app.get("/v1/experts")
    async def experts() -> dict[str, Any]:
        card = await fresh_card()
        load = {"sampler": card.sampler, "queued": card.queued, "active": card.active}
        return {"object": "list", "model": card.id, "data": [{"object": "expert", **one.model_dump()} for one in card.experts], "load": load}

    @app.get("/v1/experts/{index}/sheet", response_class=Response, responses={200: {"content": {"image/png": {}}}})
    async def expert_sheet(index: Annotated[int, PathParameter(ge=0, lt=2**31)]) -> Response:
        file = await asyncio.to_thread(sheet, index) if sheet else None
        if file is None:
            raise ApiError(404, f"index: there is no contact sheet of expert {index} here.", param="index", code="not_found")
        return Response(file, media_type="image/png", headers={"cache-control": "private, max-age=3600"})

    schema = {"requestBody": {"required": True, "content": {"application/json": {"schema": GenerationRequest.model_json_schema()}}}}

    # Of each event; its data are JSON text, as serve_app/events.py makes it.
    event = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}, "required": ["event", "data"]}
    streamed: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": event}}}}

    @app.post(IMAGES, response_model=GenerationResponse, openapi_extra=schema, responses=streamed)
    async def generate(request: Request) -> Response:
        started = time.perf_counter()
        # A page of another origin can send text/plain without asking, but not JSON: with CORS off, this keeps it out.
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"Content-Type: {kind[:80] or 'none'} is not accepted; send application/json.", code="unsupported_media_type")
        turn = turns.take(request.state.client)  # before the body, which may be slow in coming
        try:
            parsed = parse_request(await read_body(request))
            card = await recent_card()
            job = resolve(parsed, card, limits, request.state.client)
            format_ = parsed.output_format or "png"
            headers = {"x-paris-seed": str(job.seed), "x-paris-routing": job.routing}
            turn.charge(job.n)
            if parsed.stream:
                events = sampler.stream(job)
                # What is refused is refused with its own status, before the stream begins.
                first = await unless_gone(request, anext(events))
                if first is None:
                    turn.end()
                    return Response(status_code=499)

                async def ended() -> None:
                    await events.aclose()
                    turn.end()

                return EventStream(openai_events(first, events, job, card, format_, request.state.request_id, report), headers, ended)
            outcome = await unless_gone(request, sampler.generate(job))
        except Exception:
            turn.end(served=False)
            raise
        except asyncio.CancelledError:
            turn.end()
            raise
        turn.end()
        if outcome is None:
            return Response(status_code=499)
        files = await asyncio.to_thread(lambda: [encode(p, format_, job, card, outcome.degraded) for p in outcome.pictures])
        pairs = zip(files, outcome.pictures, strict=True)
        data = [
            GeneratedImage(
                b64_json=base64.b64encode(file).decode(),
                seed=job.seed,
                index=p.index,
                routing=p.routing(),
                masked_probability=p.masked_probability,
                changed=p.changed,
            )
            for file, p in pairs
        ]
        answer = GenerationResponse(
            created=int(time.time()),
            data=data,
            size=card.size,
            output_format=format_,
            model=card.id,
            seed=job.seed,
            routing=job.routing,
            degraded=list(outcome.degraded),
            timings={**outcome.timings, "total": round(time.perf_counter() - started, 4)},
        )
        headers["x-paris-timings"] = ",".join(f"{phase}={seconds:g}" for phase, seconds in answer.timings.items())
        if outcome.degraded:
            headers["x-paris-degraded"] = ",".join(f"expert-{k}" for k in outcome.degraded)
        if changed := sorted({k for item in data for k in item.changed}):
            headers["x-paris-changed"] = ",".join(f"expert-{k}" for k in changed)
        return Response(answer.model_dump_json(), media_type="application/json", headers=headers)

    _add_error_handlers(app)
    app.add_middleware(Keys, digests=key_digests)
    app.add_middleware(Envelope, echo_ids=echo_ids, report=report)
    return app


def _model(card: ModelCard) -> dict[str, Any]:
    of_one_sampler = dict.fromkeys(("warm", "queued", "active", "sampler"), True)
    extensions = card.model_dump(exclude={"id": True, "created": True, "image_size": True, **of_one_sampler, "experts": {"__all__": {"rows"}}})
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": "paris_ray",
        "size": card.size,
        **extensions,
    }


def _add_error_handlers(app: FastAPI) -> None:
    def respond(request: Request, error: ApiError, headers: dict[str, str] | None = None) -> JSONResponse:
        request.state.reason = error.code
        headers = dict(headers or {})
        if error.retry_after is not None:
            headers["retry-after"] = str(error.retry_after)
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return respond(request, error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path[:200]
        message = {404: f"{path} does not exist here.", 405: f"{request.method} is not allowed on {path}."}.get(error.status_code, str(error.detail))
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
        return respond(request, ApiError(error.status_code, message, kind, code=code), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return respond(request, ApiError(400, f"{name}: {first['msg']}.", param=name, code="invalid_value"))

    @app.exception_handler(ClientDisconnect)
    async def client_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)
