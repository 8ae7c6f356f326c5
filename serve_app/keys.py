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
    """Refuses every request without a known key, but for the open paths; with no keys configured, lets everything through.

    Whose request it is, is ``client`` in ``scope["state"]``: of the key that was compared, or of the address where there are no keys.
    """

    def __init__(self, app: ASGIApp, digests: frozenset[bytes]):
        self.app, self.digests = app, sorted(digests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Serve may mount the application below a prefix.
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        client = self._client(scope) if scope["type"] != "lifespan" else None
        if scope["type"] == "lifespan" or (scope["type"] == "http" and path in OPEN_PATHS) or client is not None:
            scope.setdefault("state", {})["client"] = client
            await self.app(scope, receive, send)
            return
        error = ApiError(401, "An API key is needed: send one header 'Authorization: Bearer KEY'.", "authentication_error", code="invalid_api_key")
        scope.setdefault("state", {})["reason"] = error.code
        await JSONResponse(error.body(), 401, {"www-authenticate": "Bearer"})(scope, receive, send)

    def _client(self, scope: Scope) -> str | None:
        """A name for whoever asks, the same at each request; None without a known key."""
        if not self.digests:
            # Not of a header: one that nobody checks would buy as many turns as one likes.
            return _name(key_digest((scope.get("client") or ("",))[0].encode()))
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        digest = key_digest(key.strip())
        # All compared, each in constant time: neither which key nor how much of it matched shows in the time taken.
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        return _name(digest) if scheme.lower() == b"bearer" and any(matches) else None


def _name(digest: bytes) -> str:
    return digest.hex()[:16]
