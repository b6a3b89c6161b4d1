"""Checks before the API: key, size of the body, number of requests, draining."""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamagen.serving.settings import ServerSettings

_OPEN = ("/health", "/ready")
"""Answered without a key and also while draining: probes ask them."""
_GUARDED = ("/v1", "/metrics")
"""Nothing else needs the key: the page and the description of the API say nothing secret."""
_UPLOADS = ("/v1/images/edits", "/v1/images/variations")
"""Where a body may hold images."""
_BODY_SECONDS = 30


@dataclass
class Gate:
    """Whether the server takes requests."""

    draining: bool = False
    """The server is about to end: what runs is finished, nothing new is taken."""


@dataclass
class _Body:
    """A request's body, as far as it has come."""

    limit: int
    """Bytes that it may have."""
    length: int = 0
    parts: list[bytes] = field(default_factory=list)

    def replayed(self, receive: Receive) -> Receive:
        """Return what gives this body, then what comes after it."""
        content = b"".join(self.parts)
        self.parts.clear()
        waiting: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

        async def replayed() -> Message:
            return waiting.pop() if waiting else await receive()

        return replayed


class Guards:
    """ASGI middleware that answers what must not reach the API."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, gate: Gate) -> None:
        self._app, self._settings, self._gate = app, settings, gate
        self._running = 0
        self._held = 0
        """Bytes of all bodies that are in memory."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http" or scope["path"] in _OPEN:
            await self._app(scope, receive, send)
            return
        is_upload = scope["path"] in _UPLOADS
        body = _Body(self._settings.max_upload if is_upload else self._settings.max_body)
        if (refusal := self._refusal(scope, body.limit)) is not None:
            await refusal(scope, receive, send)
            return
        self._running += 1
        try:
            refusal = await self._read(receive, body, is_upload=is_upload)
            await (refusal or self._app)(scope, body.replayed(receive), send)
        finally:
            self._running -= 1
            self._held -= body.length

    def _refusal(self, scope: Scope, limit: int) -> JSONResponse | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._gate.draining:
            return _refused(503, "the server is about to end; ask another, or try again later")
        if self._running >= self._settings.max_connections:
            return _refused(429, "too many requests at once; try again later")
        if scope["path"].startswith(_GUARDED) and not self._has_key(headers):
            return _refused(401, "a valid API key is needed, as Authorization: Bearer KEY")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            return _refused(413, f"the body has more than {limit} bytes")
        return None

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        if self._settings.api_key is None:
            return True
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        wanted = self._settings.api_key.encode()
        return hmac.compare_digest(given.strip(), wanted) and kind.lower() == b"bearer"

    async def _read(self, receive: Receive, body: _Body, *, is_upload: bool) -> JSONResponse | None:
        """Read a whole body, whatever length it said; or return why not."""
        more = True
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while more:
                    message = await receive()
                    part, more = message.get("body", b""), message.get("more_body", False)
                    body.parts.append(part)
                    body.length += len(part)
                    self._held += len(part)
                    if body.length > body.limit:
                        return _refused(413, f"the body has more than {body.limit} bytes")
                    if is_upload and self._held > self._settings.max_upload_memory:
                        busy = "too many images are being sent at once; try again later"
                        return _refused(429, busy)
        except TimeoutError:
            return _refused(408, f"the body did not come within {_BODY_SECONDS} seconds")
        return None


def error_body(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


_KINDS = {
    401: ("authentication_error", "invalid_api_key", {"www-authenticate": "Bearer"}),
    408: ("invalid_request_error", "body_too_slow", {"connection": "close"}),
    413: ("invalid_request_error", "body_too_large", {"connection": "close"}),
    429: ("rate_limit_error", "too_many_requests", {"retry-after": "1"}),
    503: ("server_error", "draining", {"retry-after": "1"}),
}
"""Status -> type and code of the error, and headers of the answer."""


def _refused(status: int, message: str) -> JSONResponse:
    kind, code, headers = _KINDS[status]
    return JSONResponse(error_body(message, kind, code=code), status, headers)
