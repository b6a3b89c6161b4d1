"""The server's application: OpenAI's images endpoints, models, probes, metrics, the page."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import PurePath
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException

from llamagen.config import sampling_settings
from llamagen.serving.guards import Gate, Guards, error_body
from llamagen.serving.images import ERRORS, NoModelError, Served, add_image_routes
from llamagen.serving.metrics import ServerMetrics
from llamagen.serving.models import ServedModel
from llamagen.serving.schemas import ErrorResponse, Health, ModelCard, ModelList, SettingCard
from llamagen.serving.settings import ServerSettings
from llamagen.support.errors import InputError

_KINDS = {404: ("invalid_request_error", "not_found"), 429: ("rate_limit_error", "queue_full")}
"""Status -> type and code of an error that the endpoints raise."""

_PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

_PAGE_HEADERS = {
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


def create_app(
    models: Sequence[ServedModel], *, metrics: ServerMetrics, settings: ServerSettings | None = None
) -> FastAPI:
    """Return the server's application, ready for uvicorn or any other ASGI server.

    The first of ``models`` serves requests that name none; ``metrics`` are those that they were
    given. ``app.state.gate.draining`` can be set to refuse what is new.
    """
    settings = settings or ServerSettings()
    served = Served(models, metrics, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for model in models:
            await model.close()

    app = FastAPI(
        title="llamagen",
        description="Images from autoregressive models, by an API in the form of OpenAI's.",
        version="1",
        lifespan=lifespan,
        # In the description, this takes the place of FastAPI's own 422, which is never sent.
        responses={"default": {"model": ErrorResponse, "description": "Any other failure."}},
    )
    app.state.gate = Gate()
    app.add_middleware(Guards, settings=settings, gate=app.state.gate)
    _add_error_handlers(app)
    add_image_routes(app, served)
    _add_other_routes(app, served)
    if settings.ui:
        _add_page(app)
    return app


def _add_other_routes(app: FastAPI, served: Served) -> None:
    @app.get("/v1/models", tags=["models"])
    async def models() -> ModelList:
        """The models that are served; no other can be asked for."""
        return ModelList(data=[_card(model, served.settings) for model in served.models.values()])

    @app.get("/v1/models/{name:path}", responses={404: ERRORS[404]}, tags=["models"])
    async def model(name: str) -> ModelCard:
        """One of them."""
        return _card(served.model(name), served.settings)

    unwell: dict[int | str, Any] = {503: {"model": Health}}

    @app.get("/health", response_model=Health, responses=unwell, tags=["server"])
    async def health() -> Any:
        """Whether the process answers, and its engines can draw; if not, it must start anew."""
        alive = all(model.engine.alive for model in served.models.values())
        return Health(status="ok") if alive else JSONResponse({"status": "failed"}, 503)

    @app.get("/ready", response_model=Health, responses=unwell, tags=["server"])
    async def ready() -> Any:
        """Whether requests should be sent here; not while the server is about to end."""
        if app.state.gate.draining:
            return JSONResponse({"status": "draining"}, 503)
        return await health()

    @app.get("/metrics", response_class=Response, tags=["server"])
    async def metrics() -> Response:
        """For Prometheus."""
        page = generate_latest(served.metrics.registry)
        return Response(page, media_type="text/plain; version=0.0.4")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(InputError)
    async def bad_input(_: Request, error: InputError) -> JSONResponse:
        return JSONResponse(error_body(str(error), "invalid_request_error"), 400)

    @app.exception_handler(RequestValidationError)
    async def not_valid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        message = f"{param}: {first['msg']}" if param else str(first["msg"])
        body = error_body(message, "invalid_request_error", param=param, code=first["type"])
        return JSONResponse(body, 400)

    @app.exception_handler(StarletteHTTPException)
    async def http_error(_: Request, error: StarletteHTTPException) -> JSONResponse:
        other = "server_error" if error.status_code >= 500 else "invalid_request_error"
        kind, code = _KINDS.get(error.status_code, (other, None))
        code = "model_not_found" if isinstance(error, NoModelError) else code
        body = error_body(str(error.detail), kind, code=code)
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def fault(_: Request, __: Exception) -> JSONResponse:
        # The server's log has the traceback; clients get none of it.
        return JSONResponse(error_body("the images could not be drawn", "server_error"), 500)


def _card(model: ServedModel, settings: ServerSettings) -> ModelCard:
    pipeline = model.pipeline
    own = dataclasses.asdict(pipeline.sampling)
    return ModelCard(
        id=model.name,
        created=model.created,
        kind=pipeline.transformer.config.condition,
        size=model.size_of(model.grid),
        rows=model.grid[0],
        columns=model.grid[1],
        order=pipeline.transformer.config.order,
        codes=pipeline.transformer.config.codebook_size,
        max_images=min(settings.max_images, model.max_in_flight),
        edits=model.engine.can_edit,
        classes=None if pipeline.labels is None else list(pipeline.labels.names),
        settings=own,
        declared_settings=[
            SettingCard.model_validate(
                {**dataclasses.asdict(each), "type": each.type.__name__, "default": own[each.name]}
            )
            for each in sampling_settings()
            if not each.random_order or pipeline.transformer.config.order == "random"
        ],
    )


def _add_page(app: FastAPI) -> None:
    """Serve the page at / and its files below /ui. It knows the server by the API alone."""
    for file in (importlib.resources.files("llamagen") / "assets" / "ui").iterdir():
        media_type = _PAGE_TYPES.get(PurePath(file.name).suffix)
        if media_type is not None:
            path = "/" if file.name == "index.html" else f"/ui/{file.name}"
            _add_file(app, path, file.read_bytes(), f"{media_type}; charset=utf-8")


def _add_file(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_PAGE_HEADERS, "ETag": tag}

    @app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
    async def file(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)
