"""What stands in front of the API: key, size of the body, number of requests, draining."""

from __future__ import annotations

import asyncio
import hmac
import json
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamagen.serving.settings import ServerSettings

_OPEN = ("/health", "/ready")
"""Answered without a key and also while draining: probes ask them."""
_GUARDED = ("/v1", "/metrics")
"""Nothing else needs the key: the page and the description of the API say nothing secret."""

_BODY_SECONDS = 30


@dataclass
class Gate:
    """Whether the server takes requests."""

    draining: bool = False
    """The server is about to end: what runs is finished, nothing new is taken."""


class Guards:
    """ASGI middleware that answers what must not reach the API."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, gate: Gate) -> None:
        self._app = app
        self._settings = settings
        self._gate = gate
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http" or scope["path"] in _OPEN:
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        self._running += 1
        try:
            try:
                async with asyncio.timeout(_BODY_SECONDS):
                    body = await self._body(receive)
            except TimeoutError:
                await _answer(send, 408, f"the body did not come within {_BODY_SECONDS} seconds")
                return
            if body is None:
                await _answer(send, 413, f"the body has more than {self._settings.max_body} bytes")
                return
            await self._app(scope, _replayed(body, receive), send)
        finally:
            self._running -= 1

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._gate.draining:
            return 503, "the server is about to end; ask another, or try again later"
        if self._running >= self._settings.max_connections:
            return 429, "too many requests at once; try again later"
        if scope["path"].startswith(_GUARDED) and not self._has_key(headers):
            return 401, "a valid API key is needed, as Authorization: Bearer KEY"
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._settings.max_body:
            return 413, f"the body has more than {self._settings.max_body} bytes"
        return None

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        if self._settings.api_key is None:
            return True
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        wanted = self._settings.api_key.encode()
        return hmac.compare_digest(given.strip(), wanted) and kind.lower() == b"bearer"

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body, whatever length it said; None if that is too much."""
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self._settings.max_body:
                return None
            if message["type"] != "http.request" or not message.get("more_body", False):
                return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read, then what comes after it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed


def error_body(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


_KINDS = {
    408: ("invalid_request_error", "body_too_slow"),
    401: ("authentication_error", "invalid_api_key"),
    413: ("invalid_request_error", "body_too_large"),
    429: ("rate_limit_error", "too_many_requests"),
    503: ("server_error", "draining"),
}


async def _answer(send: Send, status: int, message: str) -> None:
    kind, code = _KINDS[status]
    body = json.dumps(error_body(message, kind, code=code)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if status in (429, 503):
        headers.append((b"retry-after", b"1"))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status in (408, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
