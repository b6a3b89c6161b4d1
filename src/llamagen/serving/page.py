"""The page of ``llamagen serve --ui``: a few files, served as they are."""

from __future__ import annotations

import hashlib
import importlib.resources
from pathlib import PurePath

from fastapi import FastAPI, Request, Response

FILES = (
    *("index.html", "page.css", "page.js", "server.js"),
    *("form.js", "edit.js", "gallery.js", "shelf.js"),
)
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

_HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'self'",
            # Unfinished images come inside of events, finished ones are kept by the page.
            "img-src 'self' blob: data:",
            "object-src 'none'",
            "base-uri 'none'",
            "form-action 'self'",
            "frame-ancestors 'none'",
            # Text cannot become markup, whatever the page does with it.
            "require-trusted-types-for 'script'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Kept by the browser, but asked for again: after an update everybody has the new page.
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serve the page at / and its files below /ui. It knows the server by the API alone."""
    for name in FILES:
        _add_file(app, "/" if name == "index.html" else f"/ui/{name}", name)


def _add_file(app: FastAPI, path: str, name: str) -> None:
    content = (importlib.resources.files("llamagen") / "assets" / "ui" / name).read_bytes()
    media_type = _MEDIA_TYPES[PurePath(name).suffix] + "; charset=utf-8"
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": tag}

    @app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
    async def file(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)
