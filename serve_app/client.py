"""A small client: ``python -m serve_app.client "a red apple" --out apple.png``, and :func:`generate` for other programs."""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

URL = "http://127.0.0.1:8000"


class ServerError(RuntimeError):
    """The server refused or failed.

    Attributes:
        status: HTTP status; 0 when no answer came.
        param: the field at fault, if any.
        code: a word for programs, if any.
    """

    def __init__(self, message: str, status: int = 0, param: str | None = None, code: str | None = None):
        super().__init__(message, status, param, code)
        self.message, self.status, self.param, self.code = message, status, param, code

    def __str__(self) -> str:
        return self.message


@contextlib.contextmanager
def _ask(method: str, url: str, path: str, key: str | None, timeout: float, body: dict[str, Any] | None = None) -> Iterator[httpx.Response]:
    """A good answer, its body still to come."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Timeout(timeout, connect=10)
    try:
        with httpx.stream(method, url.rstrip("/") + path, json=body, headers=headers, timeout=limits) as response:
            if not response.is_success:
                response.read()
                raise _refusal(response, url + path)
            yield response
    except httpx.TimeoutException:
        raise ServerError(f"{url} did not answer within {timeout:g} s; it may be busy or still starting (see {url}/health/ready)") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(f"{url} cannot be reached: {error}. Is the server running, and is this its address?") from None


def _refusal(response: httpx.Response, url: str) -> ServerError:
    try:
        said = response.json()["error"]
        return ServerError(str(said["message"]), response.status_code, said.get("param"), said.get("code"))
    except (ValueError, TypeError, KeyError, AttributeError):
        message = f"{url} answered with status {response.status_code} and not as this server does: {response.text[:200]!r}"
        return ServerError(message, response.status_code)


def _call(method: str, url: str, path: str, key: str | None, timeout: float, body: dict[str, Any] | None = None) -> dict[str, Any]:
    with _ask(method, url, path, key, timeout, body) as response:
        response.read()
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise _refusal(response, url + path)
        return answer


def generate(url: str = URL, *, key: str | None = None, timeout: float = 600.0, **request: Any) -> dict[str, Any]:
    """Ask for pictures.

    Args:
        url: of the server, such as ``http://127.0.0.1:8000``.
        key: API key, if the server wants one.
        timeout: seconds to wait for the answer.
        request: fields of ``POST /v1/images/generations``, such as ``prompt``, ``n``, ``seed``, ``routing``.

    Returns:
        the answer, as :class:`serve_app.protocol.GenerationResponse` has it; pictures are base64 in ``data[i]["b64_json"]``.

    Raises:
        ServerError: the server refused, failed or cannot be reached.
    """
    return _call("POST", url, "/v1/images/generations", key, timeout, request)


def stream(url: str = URL, *, key: str | None = None, timeout: float = 600.0, **request: Any) -> Iterator[dict[str, Any]]:
    """Ask for pictures and take them, and with ``partial_images`` previews of them, as they come.

    Args:
        url: of the server, such as ``http://127.0.0.1:8000``.
        key: API key, if the server wants one.
        timeout: seconds of silence after which the server counts as not answering.
        request: fields of ``POST /v1/images/generations``.

    Yields:
        the events, as :func:`serve_app.events.openai_events` makes them; ``{"type": "waiting"}`` when the server only shows that it is at it.

    Raises:
        ServerError: the server refused, failed, cannot be reached or stopped before the end.
    """
    left = asked = int(request.get("n") or 1)
    with _ask("POST", url, "/v1/images/generations", key, timeout, {**request, "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith(":"):
                yield {"type": "waiting"}
            if not line.startswith("data:"):
                continue
            event = json.loads(line.removeprefix("data:"))
            if said := event.get("error"):
                raise ServerError(str(said.get("message")), response.status_code, said.get("param"), said.get("code"))
            left -= event["type"] == "image_generation.completed"
            yield event
    if left:
        raise ServerError(f"{url} ended its answer with {left} of {asked} pictures still to come; it may have been restarted")


def model(url: str = URL, *, key: str | None = None, timeout: float = 30.0) -> dict[str, Any]:
    """The model that the server has, with its experts and sampling defaults. Raises ServerError."""
    found: dict[str, Any] = _call("GET", url, "/v1/models", key, timeout)["data"][0]
    return found


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m serve_app.client", description="Make pictures on a running server.")
    parser.add_argument("prompt")
    parser.add_argument("--url", default=URL)
    parser.add_argument("--out", default="picture.png", metavar="FILE", help="name.png, name.jpg or name.webp; several pictures get name-0, name-1 …")
    parser.add_argument("--n", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--steps", type=int, dest="num_inference_steps")
    parser.add_argument("--guidance", type=float, dest="guidance_scale")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="times with guidance; 0 is data, 1 is noise")
    parser.add_argument("--negative", dest="negative_prompt")
    parser.add_argument("--routing", help="top-2, threshold, full, caption, expert-3 …")
    parser.add_argument("--solver", choices=["euler", "heun", "midpoint", "dpmpp_2m"])
    parser.add_argument("--previews", type=int, dest="partial_images", metavar="N", help="up to 3 looks at each picture on its way: name-preview-0 …")
    arguments = vars(parser.parse_args(argv))
    url, out = arguments.pop("url"), Path(arguments.pop("out"))
    formats = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
    if out.suffix.lower() not in formats:
        parser.error(f"--out {out}: the name must end in {', '.join(formats)}")
    if not out.absolute().parent.is_dir():
        parser.error(f"--out {out}: there is no folder {out.absolute().parent}; make it first")
    request = {name: value for name, value in arguments.items() if value is not None}
    request["output_format"] = formats[out.suffix.lower()]
    began = time.monotonic()
    try:
        for event in stream(url, key=os.environ.get("PARIS_API_KEY"), **request):
            _take(event, out, request, time.monotonic() - began)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.status == 401:
            print("Put your key into the environment variable PARIS_API_KEY.", file=sys.stderr)
        return 1
    return 0


def _take(event: dict[str, Any], out: Path, request: dict[str, Any], seconds: float) -> None:
    """Write the file of an event, and say so."""
    if event["type"] == "waiting":
        print(f"still working, {seconds:.0f} s", file=sys.stderr)
        return
    path = out if request.get("n", 1) == 1 else out.with_stem(f"{out.stem}-{event['index']}")
    file = base64.b64decode(event["b64_json"])
    if event["type"] == "image_generation.partial_image":
        path = path.with_stem(f"{path.stem}-preview-{event['partial_image_index']}")
        path.write_bytes(file)
        print(f"{path}: preview {event['partial_image_index'] + 1} of {request['partial_images']}, {seconds:.1f} s", file=sys.stderr)
        return
    path.write_bytes(file)
    shares = [sum(column) / len(event["routing"]) for column in zip(*(step["weights"] for step in event["routing"]), strict=True)]
    who = ", ".join(f"expert {k} {share:.0%}" for k, share in sorted(enumerate(shares), key=lambda pair: -pair[1]) if share >= 0.005)
    print(f"{path}: seed {event['seed']}, picture {event['index']}; {who}; {seconds:.1f} s")
    if event["degraded"]:
        print(f"Made without expert {', '.join(map(str, event['degraded']))}: not available just then.", file=sys.stderr)
    if changed := event.get("changed"):
        who = ", ".join(map(str, changed))
        print(f"The weights of expert {who} were exchanged meanwhile: the same seed gives another picture now.", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
