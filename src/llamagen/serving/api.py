"""The HTTP API: OpenAI's images endpoint, models, probes, metrics."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Receive, Scope, Send

from llamagen.errors import InputError
from llamagen.pictures import image_bytes
from llamagen.serving.files import FileStore
from llamagen.serving.guards import Gate, Guards, error_body
from llamagen.serving.metrics import ServerMetrics
from llamagen.serving.models import Job, QueueFullError, Reservation, ServedModel, Update
from llamagen.serving.schemas import (
    ErrorResponse,
    Health,
    ImageData,
    ImageEvent,
    ImageRequest,
    ImagesResponse,
    ModelCard,
    ModelList,
    TokenDetails,
    Usage,
)
from llamagen.serving.settings import ServerSettings

_log = logging.getLogger(__name__)

_SETTINGS = ("guidance_scale", "guidance_stop", "top_k", "top_p", "temperature")
_MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_ERROR_SCHEMA = "#/components/schemas/ErrorResponse"
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "Something in the request cannot be used; the message names it.",
        401: "The API key is missing or wrong.",
        404: "There is no such model or file.",
        413: "The body is too large.",
        429: "Too many images wait; Retry-After says when to ask again.",
        500: "The images could not be drawn.",
        503: "The server is about to end.",
        504: "The images took too long.",
    }.items()
}


class _NoModelError(HTTPException):
    pass


class _Served:
    """What the endpoints share."""

    def __init__(
        self, models: Sequence[ServedModel], metrics: ServerMetrics, settings: ServerSettings
    ) -> None:
        self.models = {model.name: model for model in models}
        self.metrics = metrics
        self.settings = settings
        self.files = FileStore(lifetime=settings.file_lifetime, memory=settings.file_memory)

    @property
    def alive(self) -> bool:
        """Whether all engines can draw."""
        return all(model.engine.alive for model in self.models.values())

    def model(self, name: str | None) -> ServedModel:
        """Raises an HTTPException of status 404 if there is no such model."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise _NoModelError(404, f"there is no model {name!r}; choose one of /v1/models")
        return self.models[name]


def create_app(
    models: Sequence[ServedModel],
    *,
    metrics: ServerMetrics,
    settings: ServerSettings | None = None,
) -> FastAPI:
    """The server's application, ready for uvicorn or any other ASGI server.

    ``app.state.gate.draining`` can be set to refuse what is new.

    Args:
        models: at least one; the first serves requests that name none.
        metrics: the one that the models were given.
        settings: limits and secrets.
    """
    settings = settings or ServerSettings()
    served = _Served(models, metrics, settings)

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
    )
    app.state.gate = Gate()
    app.add_middleware(Guards, settings=settings, gate=app.state.gate)
    _add_error_handlers(app)
    _add_image_routes(app, served)
    _add_other_routes(app, served)
    _describe_errors_as_they_are(app)
    if settings.ui:
        from llamagen.serving.page import add_page

        add_page(app)
    return app


def _describe_errors_as_they_are(app: FastAPI) -> None:
    """Takes FastAPI's own answer to bad requests, a 422, out of the API's description: ours is a
    400 in OpenAI's form.
    """
    described = app.openapi

    def without_422() -> dict[str, Any]:
        schema = described()
        for path in schema["paths"].values():
            for operation in path.values():
                if operation["responses"].pop("422", None):
                    bad = {"application/json": {"schema": {"$ref": _ERROR_SCHEMA}}}
                    operation["responses"].setdefault(
                        "400", {"description": "Bad request", "content": bad}
                    )
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        return schema

    app.openapi = without_422  # type: ignore[method-assign]


def _add_image_routes(app: FastAPI, served: _Served) -> None:
    @app.post(
        "/v1/images/generations",
        response_model=ImagesResponse,
        response_model_exclude_none=True,
        responses={
            200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
            **_ERRORS,
        },
        tags=["images"],
    )
    async def generate(body: ImageRequest, request: Request) -> Any:
        """Draws images.

        With ``stream`` the answer is a stream of events: ``image_generation.partial_image`` as
        rows are finished, ``image_generation.completed`` for each image.
        """
        model = served.model(body.model)
        status = 500
        try:
            job = await _job(model, body, served.settings)
            room = model.reserve(job)
            if body.stream:
                status = 200
                return _EventStream(_events(model, job, body, room, served.settings.timeout), room)
            with room:
                images = await _unless_gone(
                    request, _all_images(model, job, served.settings.timeout)
                )
                room.made = True
            status = 200
            files = await asyncio.to_thread(_files, model, job, body, images)
            return _response(model, job, body, files, request, served)
        except (InputError, HTTPException) as error:
            status = getattr(error, "status_code", 400)
            raise
        except QueueFullError:
            status = 429
            raise
        except TimeoutError as error:
            status = 504
            raise HTTPException(504, "the images took too long; ask for fewer") from error
        finally:
            served.metrics.requests.labels(model.name, str(status)).inc()

    @app.get(
        "/v1/files/{name}",
        response_class=Response,
        responses={404: _ERRORS[404], 200: {"content": {"image/png": {}}}},
        tags=["images"],
    )
    async def file(name: Annotated[str, Path(max_length=100)]) -> Response:
        """An image that a response with ``response_format`` url named; it is kept for a time."""
        found = served.files.get(name.split(".")[0])
        if found is None:
            raise HTTPException(404, "there is no such file, or it has expired")
        return Response(
            found.content,
            media_type=found.media_type,
            headers={"Cache-Control": "private", "X-Content-Type-Options": "nosniff"},
        )


def _add_other_routes(app: FastAPI, served: _Served) -> None:
    @app.get("/v1/models", tags=["models"])
    async def models() -> ModelList:
        """The models that are served; no other can be asked for."""
        return ModelList(data=[_card(model, served.settings) for model in served.models.values()])

    @app.get("/v1/models/{name:path}", responses={404: _ERRORS[404]}, tags=["models"])
    async def model(name: str) -> ModelCard:
        """One of them."""
        return _card(served.model(name), served.settings)

    @app.get("/health", response_model=Health, responses={503: {"model": Health}}, tags=["server"])
    async def health() -> Any:
        """Whether the process answers, and its engines can draw; if not, it must start anew."""
        if not served.alive:
            return JSONResponse({"status": "failed"}, 503)
        return Health(status="ok")

    @app.get("/ready", response_model=Health, responses={503: {"model": Health}}, tags=["server"])
    async def ready() -> Any:
        """Whether requests should be sent here; not while the server is about to end."""
        if app.state.gate.draining:
            return JSONResponse({"status": "draining"}, 503)
        if not served.alive:
            return JSONResponse({"status": "failed"}, 503)
        return Health(status="ok")

    @app.get("/metrics", response_class=Response, tags=["server"])
    async def metrics() -> Response:
        """What Prometheus reads."""
        return Response(served.metrics.page(), media_type="text/plain; version=0.0.4")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(InputError)
    async def bad_input(_: Request, error: InputError) -> JSONResponse:
        return JSONResponse(error_body(str(error), "invalid_request_error"), 400)

    @app.exception_handler(RequestValidationError)
    async def not_valid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"][1:]]
        param = ".".join(where) or None
        message = f"{param}: {first['msg']}" if param else str(first["msg"])
        if first["type"] == "extra_forbidden":
            message = f"{param} is no parameter of this API; leave it out"
        body = error_body(message, "invalid_request_error", param=param, code=first["type"])
        return JSONResponse(body, 400)

    @app.exception_handler(QueueFullError)
    async def queue_full(_: Request, error: QueueFullError) -> JSONResponse:
        body = error_body(str(error), "rate_limit_error", code="queue_full")
        return JSONResponse(body, 429, headers={"Retry-After": str(error.retry_after)})

    @app.exception_handler(StarletteHTTPException)
    async def http_error(_: Request, error: StarletteHTTPException) -> JSONResponse:
        kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
        code = "not_found" if error.status_code == 404 else None
        if isinstance(error, _NoModelError):
            code = "model_not_found"
        body = error_body(str(error.detail), kind, code=code)
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def fault(_: Request, __: Exception) -> JSONResponse:
        # The server's log has the traceback; clients get none of it.
        return JSONResponse(error_body("the images could not be drawn", "server_error"), 500)


async def _job(model: ServedModel, body: ImageRequest, settings: ServerSettings) -> Job:
    """What a request asks for.

    Raises:
        InputError: it asks for what there is not.
    """
    images = body.n or 1
    if images > settings.max_images:
        raise InputError(f"n is {images}, but a request may ask for {settings.max_images} at most")
    for name in ("prompt", "negative_prompt"):
        if len(getattr(body, name) or "") > settings.max_prompt:
            raise InputError(f"{name} has more than {settings.max_prompt} characters; shorten it")
    if body.size not in (None, "auto", model.size):
        raise InputError(f"size is {body.size!r}, but {model.name} draws {model.size}; use auto")
    given = {name: getattr(body, name) for name in _SETTINGS}
    return await model.job(
        body.prompt,
        body.negative_prompt,
        images=images,
        seed=body.seed,
        settings={name: value for name, value in given.items() if value is not None},
    )


async def _all_images(model: ServedModel, job: Job, timeout: float) -> list[Image.Image]:
    """All images of a job, in order; each is decoded as soon as it is drawn."""
    decoding: dict[int, asyncio.Task[Image.Image]] = {}
    async with (
        asyncio.timeout(timeout),
        contextlib.aclosing(model.updates(job)) as updates,
    ):
        async for update in updates:
            if update.rows == model.grid[0]:
                decoding[update.index] = asyncio.create_task(model.image(update.codes))
        return [await decoding[index] for index in range(len(job.seeds))]


async def _unless_gone(request: Request, work: Any) -> Any:
    """What ``work`` returns; it is cancelled when the client hangs up.

    Raises:
        HTTPException: the client is gone, and nobody reads this.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the client has closed the connection")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Returns when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _response(
    model: ServedModel,
    job: Job,
    body: ImageRequest,
    files: Sequence[bytes],
    request: Request,
    served: _Served,
) -> ImagesResponse:
    kind = body.output_format or "png"
    data = []
    for index, content in enumerate(files):
        entry = ImageData(seed=job.seeds[index])
        if body.response_format == "url":
            name = served.files.add(content, _MEDIA_TYPES[kind])
            entry.url = str(request.base_url) + f"v1/files/{name}.{kind}"
        else:
            entry.b64_json = base64.b64encode(content).decode()
        data.append(entry)
    return ImagesResponse(
        created=int(time.time()),
        data=data,
        model=model.name,
        output_format=kind,
        size=model.size,
        usage=_usage(model, job, len(files)),
        settings={name: getattr(job.sampling, name) for name in _SETTINGS},
    )


class _EventStream(StreamingResponse):
    """Server-sent events; the room that they need is free again however the stream ends."""

    def __init__(self, events: AsyncIterator[str], room: Reservation) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._room:
            await super().__call__(scope, receive, send)


async def _events(
    model: ServedModel,
    job: Job,
    body: ImageRequest,
    room: Reservation,
    timeout: float,
) -> AsyncIterator[str]:
    """The events of a stream; also an error after the stream has begun is one."""
    wanted = _partial_rows(model.grid[0], body.partial_images or 0)
    shown = [0] * len(job.seeds)
    try:
        async with (
            asyncio.timeout(timeout),
            contextlib.aclosing(model.updates(job)) as updates,
        ):
            async for update in updates:
                if update.rows in wanted or update.rows == model.grid[0]:
                    yield await _event(model, job, body, update, shown)
        room.made = True
    # The status was sent long ago: the client is told in the stream.
    except Exception as error:  # noqa: BLE001
        _log.exception("a stream failed")
        late = isinstance(error, TimeoutError)
        message = "the images took too long" if late else "the images could not be drawn"
        yield f"event: error\ndata: {json.dumps(error_body(message, 'server_error'))}\n\n"


async def _event(
    model: ServedModel, job: Job, body: ImageRequest, update: Update, shown: list[int]
) -> str:
    done = update.rows == model.grid[0]
    image = await model.image(update.codes)
    content = await asyncio.to_thread(_encoded, model, job, update.index, image, body)
    kind = "completed" if done else "partial_image"
    event = ImageEvent(
        type=f"image_generation.{kind}",  # type: ignore[arg-type]
        index=update.index,
        seed=job.seeds[update.index],
        b64_json=base64.b64encode(content).decode(),
        created_at=int(time.time()),
        output_format=body.output_format or "png",
        size=model.size,
        partial_image_index=None if done else shown[update.index],
        rows=update.rows,
        usage=_usage(model, job, 1) if done else None,
    )
    shown[update.index] += 1
    return f"event: {event.type}\ndata: {event.model_dump_json(exclude_none=True)}\n\n"


def _partial_rows(rows: int, count: int) -> set[int]:
    """After which rows of the grid an unfinished image is sent."""
    if count == 0:
        return set()
    count = min(count, rows - 1)
    return {max(1, rows * (index + 1) // (count + 1)) for index in range(count)}


def _files(
    model: ServedModel, job: Job, body: ImageRequest, images: Sequence[Image.Image]
) -> list[bytes]:
    return [_encoded(model, job, index, image, body) for index, image in enumerate(images)]


def _encoded(
    model: ServedModel, job: Job, index: int, image: Image.Image, body: ImageRequest
) -> bytes:
    quality = 90 if body.output_compression is None else body.output_compression
    metadata = model.metadata(job, index)
    return image_bytes(image, body.output_format or "png", quality=quality, metadata=metadata)


def _usage(model: ServedModel, job: Job, images: int) -> Usage:
    drawn = model.grid[0] * model.grid[1] * images
    return Usage(
        input_tokens=job.input_tokens,
        input_tokens_details=TokenDetails(text_tokens=job.input_tokens),
        output_tokens=drawn,
        total_tokens=job.input_tokens + drawn,
    )


def _card(model: ServedModel, settings: ServerSettings) -> ModelCard:
    pipeline = model.pipeline
    sampling = pipeline.sampling
    return ModelCard(
        id=model.name,
        created=model.created,
        kind=pipeline.transformer.config.condition,
        size=model.size,
        rows=model.grid[0],
        columns=model.grid[1],
        codes=pipeline.transformer.config.codebook_size,
        max_images=min(settings.max_images, model.max_in_flight),
        classes=None if pipeline.labels is None else list(pipeline.labels.names),
        settings={name: getattr(sampling, name) for name in _SETTINGS},
    )
