"""API keys: what is kept of them, and the middleware that asks for one."""

from __future__ import annotations

import hashlib
import hmac
import re

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.protocol import ApiError

OPEN_PATHS = frozenset({"/", "/experts", "/health/live", "/health/ready"})
"""What needs no key: the pages, which say nothing of the model and ask for a key, and the health checks."""

_KEY = re.compile(r"[\x21-\x7e]{8,256}")


def key_digest(key: bytes) -> bytes:
    """What is kept of an API key."""
    return hashlib.sha256(key).digest()


def key_digests(text: str) -> frozenset[bytes]:
    """Digests of the API keys in a text: one a line (or separated by commas), ``#`` starts a comment.

    Raises:
        ValueError: no key, or one that cannot be sent in a header.
    """
    words = [word.strip() for line in text.splitlines() for word in line.split("#")[0].split(",")]
    keys = frozenset(word for word in words if word)
    if not keys:
        raise ValueError("API keys: none found; write one a line, or unset PARIS_API_KEYS and PARIS_API_KEYS_FILE to serve without keys")
    if not all(_KEY.fullmatch(key) for key in keys):
        raise ValueError("API keys: a key must be 8 to 256 printable ASCII characters without spaces")
    return frozenset(key_digest(key.encode()) for key in keys)


class Keys:
    """Refuses every request without a known key, but for the open paths; with no keys configured, lets everything through."""

    def __init__(self, app: ASGIApp, digests: frozenset[bytes]):
        self.app, self.digests = app, sorted(digests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Serve may mount the application below a prefix.
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if not self.digests or scope["type"] == "lifespan" or (scope["type"] == "http" and path in OPEN_PATHS) or self._known(scope):
            await self.app(scope, receive, send)
            return
        error = ApiError(401, "An API key is needed: send 'Authorization: Bearer KEY'.", "authentication_error", code="invalid_api_key")
        scope.setdefault("state", {})["reason"] = error.code
        await JSONResponse(error.body(), 401, {"www-authenticate": "Bearer"})(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        digest = key_digest(key.strip())
        # All compared, each in constant time: neither which key nor how much of it matched shows in the time taken.
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        return scheme.lower() == b"bearer" and any(matches)
