"""What goes over the wire: requests, answers and errors, in the shape of OpenAI's images API with extensions at top level.

Imports no torch: the HTTP process checks requests with this module alone.
"""

from __future__ import annotations

import difflib
import secrets
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic_core
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from paris_ray.diffusion.routing import Routing
from paris_ray.diffusion.solvers import evaluations
from serve_app.cards import ModelCard
from serve_app.limits import Limits
from serve_app.work import Job

IMAGES = "/v1/images/generations"
MAX_BODY_BYTES = 64 * 1024
MAX_PREVIEWS = 3
T = TypeVar("T")


class ApiError(Exception):
    """An error with the status and body that the client gets; everything in ``args``, so that it survives a process boundary.

    Args:
        status: HTTP status.
        message: what is wrong, with value, rule and remedy.
        type: OpenAI's class of error, such as ``invalid_request_error``.
        param: the field at fault.
        code: a word for programs.
        retry_after: seconds after which to come again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(status, message, type, param, code, retry_after)
        self.status, self.message, self.type, self.param, self.code, self.retry_after = status, message, type, param, code, retry_after

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, dict[str, Any]]:
        """As :class:`ErrorAnswer` has it."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class ErrorBody(BaseModel):
    """What went wrong: in words, as OpenAI's class of error, the field at fault, and a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The one shape that every error has."""

    error: ErrorBody


# -- requests -----------------------------------------------------------------------------------------------------------


def _rising(ends: list[float]) -> list[float]:
    if len(ends) != 2 or not ends[0] < ends[1]:
        raise ValueError("not two rising numbers")
    return ends


class GenerationRequest(BaseModel):
    """Body of ``POST /v1/images/generations``. A field that is null counts as not given."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    prompt: Annotated[str, Field(min_length=1)]
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    # "WxH" or "auto"; a model makes pictures of one size.
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    # Answer with server-sent events, and how many previews each picture gets before it is done.
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=MAX_PREVIEWS)] | None = None

    # Extensions.
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    # Index of the first picture: picture i of a request is drawn from (seed, index + i), so any picture can be made again alone.
    index: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Annotated[float, Field(ge=1, le=50)] | None = None
    # Lowest and highest time with guidance, [low, high] with 0 ≤ low < high ≤ 1 (0 is data, 1 is noise); outside it is off and costs one pass.
    guidance_interval: Annotated[list[Annotated[float, Field(ge=0, le=1)]], AfterValidator(_rising)] | None = None
    negative_prompt: str | None = None
    routing: str | None = None
    # Evaluations of the velocity a step: euler and dpmpp_2m one, heun and midpoint two.
    solver: Literal["euler", "heun", "midpoint", "dpmpp_2m"] | None = None

    # OpenAI's fields that change nothing here, accepted with values that ask for nothing else.
    user: str | None = None
    safety_identifier: str | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None


UNSUPPORTED = {
    "style": "describe the style in the prompt",
    "output_compression": "choose png, jpeg or webp with output_format",
    "image": "pictures are made from text only",
    "mask": "pictures are made from text only",
    "input_fidelity": "pictures are made from text only",
    "complexity": "use num_inference_steps",
    "frame_count": "pictures do not move",
    "frame_duration_ms": "pictures do not move",
    "svg": "pictures are png, jpeg or webp",
}
"""Fields of OpenAI's API that this server knows and refuses, and what to do instead."""

_RULES = {
    "guidance_interval": "must be two times [low, high] with 0 <= low < high <= 1, where 0 is data and 1 is noise; leave it out to guide everywhere",
    "partial_images": f"must be a whole number from 0 to {MAX_PREVIEWS}",
    "response_format": "only 'b64_json' is served; pictures are not kept here, so there are no URLs",
    "quality": "has no effect here; only 'auto' and 'standard' are accepted. Use num_inference_steps",
    "background": "pictures are opaque; only 'auto' and 'opaque' are accepted",
    "moderation": "nothing is moderated here; only 'auto' and 'low' are accepted",
}


def parse_request(body: bytes) -> GenerationRequest:
    """Read and check a request body by itself; what depends on the model is checked by :func:`resolve`.

    Raises:
        ApiError: status 400, naming the field.
    """
    try:
        value = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"The body must be a JSON object with a prompt, not {_json_type(value)}.", code="invalid_json")
    for name in value:
        if name in UNSUPPORTED and value[name] is not None:
            raise ApiError(400, f"{name}: not supported by this server; {UNSUPPORTED[name]}.", param=name, code="unsupported_parameter")
    value = {name: item for name, item in value.items() if name not in UNSUPPORTED}
    try:
        return GenerationRequest.model_validate(value)
    except pydantic.ValidationError as error:
        raise _explain(error) from None


def _json_type(value: Any) -> str:
    return {type(None): "null", bool: "a boolean", str: "a string", list: "an array"}.get(type(value), "a number")


def _explain(error: pydantic.ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else None
    shown = repr(first["input"])
    shown = shown if len(shown) <= 80 else shown[:77] + "…"
    if first["type"] == "extra_forbidden":
        short = str(name)[:80]
        close = difflib.get_close_matches(short, list(GenerationRequest.model_fields), n=1)
        hint = f" Did you mean '{close[0]}'?" if close else f" Known are {', '.join(GenerationRequest.model_fields)}."
        return ApiError(400, f"{short}: unknown field.{hint}", param=short, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{name}: required and not given.", param=name, code="missing_required_parameter")
    rule = _RULES.get(name or "", first["msg"])
    return ApiError(400, f"{name}: {rule} (got {shown}).", param=name, code="invalid_value")


def resolve(request: GenerationRequest, card: ModelCard, limits: Limits, client: str = "") -> Job:
    """Fill in the defaults and check against the model and the limits.

    Raises:
        ApiError: status 400, or 404 for a model that is not here.
    """
    if request.model is not None and request.model != card.id:
        raise ApiError(404, f"model: {_short(request.model)} is not served here; this server has {card.id!r}.", param="model", code="model_not_found")
    if request.size not in (None, "auto", card.size):
        raise ApiError(
            400,
            f"size: {_short(request.size)} is not served; this model makes {card.size} only (or send 'auto').",
            param="size",
            code="invalid_value",
        )
    previews = _default(request.partial_images, 0)
    if previews and not request.stream:
        raise ApiError(400, "partial_images: previews come only with 'stream': true; send it, too.", param="partial_images", code="invalid_value")
    n = _default(request.n, 1)
    _at_most("n", n, limits.max_images_per_request, "send several requests")
    steps = _default(request.num_inference_steps, int(card.sampling["steps"]))
    _at_most("num_inference_steps", steps, limits.max_steps, "use fewer steps")
    solver = _default(request.solver, str(card.sampling["solver"]))
    work = n * evaluations(solver, steps)
    most = max(limits.max_image_steps, 2 * limits.max_steps)
    if work > most:
        raise ApiError(
            400,
            f"num_inference_steps: {n} pictures of {steps} {solver} steps are {work} evaluations, above this server's limit of "
            f"{most} a request; lower n or num_inference_steps.",
            param="num_inference_steps",
            code="invalid_value",
        )
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt or "")):
        if len(text) > limits.max_prompt_chars:
            raise ApiError(
                400,
                f"{name}: {len(text)} characters, above this server's limit of {limits.max_prompt_chars}; shorten it.",
                param=name,
                code="string_above_max_length",
            )
    try:
        routing = Routing.parse(_default(request.routing, str(card.sampling["routing"])), len(card.experts))
    except ValueError as error:
        raise ApiError(400, f"{error}.", param="routing", code="invalid_value") from None
    # Fifteen digits: they survive JSON in a browser.
    seed = _default(request.seed, secrets.randbelow(2**48))
    guidance = _default(request.guidance_scale, float(card.sampling["guidance_scale"]))
    index = _default(request.index, 0)
    _at_most("index", index + n, 2**31, "choose a smaller one")
    low, high = _default(request.guidance_interval, [0.0, 1.0])
    return Job(request.prompt, request.negative_prompt or "", n, seed, index, steps, guidance, str(routing), solver, client, (low, high), previews)


def _default(value: T | None, default: T) -> T:
    return default if value is None else value


def _short(text: str | None) -> str:
    return repr(text if text is None or len(text) <= 80 else text[:77] + "…")


def _at_most(name: str, value: int, limit: int, remedy: str) -> None:
    if value > limit:
        shown = value if value < 10**12 else "a number of more than twelve digits"
        raise ApiError(400, f"{name}: {shown} is above this server's limit of {limit}; {remedy}.", param=name, code="invalid_value")


# -- answers ------------------------------------------------------------------------------------------------------------


class GeneratedImage(BaseModel):
    """One picture of an answer."""

    b64_json: str
    seed: int
    index: int
    # Per velocity evaluation: time (1 noise, 0 data) and each expert's weight.
    routing: list[dict[str, Any]]
    # The most that the router gave, at one time, to experts that were not available.
    masked_probability: float
    # Experts whose weights were exchanged while it was made: a retry with the same seed gives another picture.
    changed: list[int]


class GenerationResponse(BaseModel):
    """Answer of ``POST /v1/images/generations``."""

    created: int
    data: list[GeneratedImage]
    size: str
    output_format: str
    model: str
    seed: int
    routing: str
    # Indices of experts that were masked; the rest took over their share.
    degraded: list[int]
    # Seconds by phase.
    timings: dict[str, float]
