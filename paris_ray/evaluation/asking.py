"""Asking a served model for pictures over HTTP: concurrent, patient with a full queue, and never twice for the same picture. No Ray, no torch."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import httpx

from paris_ray.storage import Folder

CONCURRENT = 32
"""Requests in flight: enough to let the server batch, few enough for its queue."""

TIMEOUT_SECONDS = 600.0
PATIENCE_SECONDS = 600.0
"""How long one picture may be put off with 429 or 503 before the evaluation gives up."""

API_KEY = "PARIS_API_KEY"
"""The environment variable that holds the client's key, where the server asks for one."""


class EndpointError(RuntimeError):
    """The endpoint cannot be used for an evaluation; the message says why and what to do."""


@dataclass(frozen=True)
class Ask:
    """One picture to ask for: the request's body, and the file it goes to (without extension) below the folder."""

    file: str
    body: dict[str, Any]


class Endpoint:
    """A served model.

    Args:
        url: ``http://host:port``, with or without ``/v1``.
        transport: for tests; an httpx transport in place of the network.

    Raises:
        EndpointError: the URL is empty or not HTTP.
    """

    def __init__(self, url: str | None, transport: httpx.BaseTransport | None = None):
        if not url or not url.startswith(("http://", "https://")):
            raise EndpointError(
                f"endpoint: {url!r} is not an http:// or https:// address. The table is measured over HTTP: "
                "serve the model and pass --endpoint http://127.0.0.1:8000"
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get(API_KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(TIMEOUT_SECONDS, connect=10.0), transport=transport)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def model(self) -> dict[str, Any]:
        """What ``/v1/models`` says of the model that is served.

        Raises:
            EndpointError: nobody answers, or not as an images server does.
        """
        answer = self._send("GET", "/v1/models", None)
        try:
            return dict(answer["data"][0])
        except (KeyError, IndexError, TypeError) as error:
            raise EndpointError(f"{self.url}/v1/models lists no model: {json.dumps(answer)[:200]}") from error

    def check(self, fingerprint: str) -> None:
        """Raise EndpointError unless the endpoint serves the model with this fingerprint."""
        served = self.model()
        if served.get("fingerprint") != fingerprint:
            raise EndpointError(
                f"{self.url} serves {served.get('id')!r} with fingerprint {served.get('fingerprint')}, this run's model is {fingerprint}; "
                "serve RUN/model of this run and try again"
            )

    def picture(self, body: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        """Ask for one picture.

        Returns:
            the PNG, and the rest of the answer: ``routing`` (weights per step), ``seed``, ``timings`` …

        Raises:
            EndpointError: refused, failed, or the answer is degraded (experts missing), which would not be a measurement of this model.
        """
        answer = self._send("POST", "/v1/images/generations", {**body, "n": 1, "output_format": "png"})
        if answer.get("degraded"):
            raise EndpointError(
                f"{self.url} answered without experts {answer['degraded']}; wait until all are ready and run this again "
                "(pictures made so far are kept)"
            )
        item = dict(answer["data"][0])
        png = base64.b64decode(item.pop("b64_json"))
        return png, {**{name: value for name, value in answer.items() if name != "data"}, "picture": item}

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                response = self.client.request(method, path, json=body)
            except httpx.TransportError as error:
                raise EndpointError(f"{self.url} does not answer ({type(error).__name__}: {error}); is the model served there?") from error
            if response.status_code in (429, 503) and time.monotonic() < deadline:
                time.sleep(_retry_after(response))
                continue
            if response.status_code in (401, 403):
                raise EndpointError(f"{self.url}{path} wants an API key; put one in the environment variable {API_KEY}")
            if response.status_code != 200:
                raise EndpointError(f"{method} {self.url}{path} answered {response.status_code}: {response.text[:500]}")
            return dict(response.json())


def ask_all(endpoint: Endpoint, asks: Sequence[Ask], folder: Folder, done: Callable[[], None]) -> None:
    """Ask for pictures that are not in the folder yet.

    Each becomes ``FILE.json`` (the answer without the picture) and then ``FILE.png``: a PNG that is there is complete.

    Args:
        endpoint: whom to ask.
        asks: what for.
        folder: where pictures go.
        done: called after each picture, also for those already there, from this thread.

    Raises:
        EndpointError: the first error; requests in flight are waited for, the rest are not sent.
    """
    there = {entry.name for entry in folder.files(recursive=True)}
    missing = [ask for ask in asks if f"{ask.file}.png" not in there]
    for _ in range(len(asks) - len(missing)):
        done()

    def one(ask: Ask) -> None:
        png, answer = endpoint.picture(ask.body)
        folder.write_json(f"{ask.file}.json", answer)
        folder.write_bytes(f"{ask.file}.png", png)

    with ThreadPoolExecutor(CONCURRENT) as pool:
        futures = [pool.submit(one, ask) for ask in missing]
        try:
            for future in as_completed(futures):
                future.result()
                done()
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _retry_after(response: httpx.Response) -> float:
    try:
        return min(60.0, max(0.1, float(response.headers.get("retry-after", "1"))))
    except ValueError:
        return 1.0
