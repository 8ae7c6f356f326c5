"""A small client: ``python -m serve_app.client "a red apple" --out apple.png``, and :func:`generate` for other programs."""

from __future__ import annotations

import argparse
import base64
import os
import sys
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


def _call(method: str, url: str, path: str, key: str | None, timeout: float, body: dict[str, Any] | None = None) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        response = httpx.request(method, url.rstrip("/") + path, json=body, headers=headers, timeout=httpx.Timeout(timeout, connect=10))
    except httpx.TimeoutException:
        raise ServerError(f"{url} did not answer within {timeout:g} s; it may be busy or still starting (see {url}/health/ready)") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(f"{url} cannot be reached: {error}. Is the server running, and is this its address?") from None
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if response.is_success and isinstance(answer, dict):
        return answer
    said = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(said, dict):
        raise ServerError(str(said.get("message")), response.status_code, said.get("param"), said.get("code"))
    raise ServerError(
        f"{url}{path} answered with status {response.status_code} and not as this server does: {response.text[:200]!r}", response.status_code
    )


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
    arguments = vars(parser.parse_args(argv))
    url, out = arguments.pop("url"), Path(arguments.pop("out"))
    formats = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
    if out.suffix.lower() not in formats:
        parser.error(f"--out {out}: the name must end in {', '.join(formats)}")
    if not out.absolute().parent.is_dir():
        parser.error(f"--out {out}: there is no folder {out.absolute().parent}; make it first")
    request = {name: value for name, value in arguments.items() if value is not None}
    try:
        answer = generate(url, key=os.environ.get("PARIS_API_KEY"), output_format=formats[out.suffix.lower()], **request)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.status == 401:
            print("Put your key into the environment variable PARIS_API_KEY.", file=sys.stderr)
        return 1
    for number, image in enumerate(answer["data"]):
        path = out if len(answer["data"]) == 1 else out.with_stem(f"{out.stem}-{number}")
        path.write_bytes(base64.b64decode(image["b64_json"]))
        shares = [sum(column) / len(image["routing"]) for column in zip(*(step["weights"] for step in image["routing"]), strict=True)]
        who = ", ".join(f"expert {k} {share:.0%}" for k, share in sorted(enumerate(shares), key=lambda pair: -pair[1]) if share >= 0.005)
        print(f"{path}: seed {image['seed']}, picture {image['index']}; {who}")
    if answer["degraded"]:
        print(f"Made without expert {', '.join(map(str, answer['degraded']))}: not available just then.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
