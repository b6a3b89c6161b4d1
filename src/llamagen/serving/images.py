"""The endpoints that make images: OpenAI's generations, edits and variations, and files."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Path, Request, Response
from fastapi.responses import StreamingResponse
from PIL import Image
from starlette.types import Receive, Scope, Send

from llamagen.pipeline.editing import INPAINTING_CANDIDATES, Edit, Editor
from llamagen.serving.files import FileStore
from llamagen.serving.guards import error_body
from llamagen.serving.jobs import Job, Update
from llamagen.serving.metrics import ServerMetrics
from llamagen.serving.models import QueueFullError, Reservation, ServedModel
from llamagen.serving.schemas import (
    EditRequest,
    ErrorResponse,
    ImageData,
    ImageEvent,
    ImageRequest,
    ImagesResponse,
    TokenDetails,
    Usage,
    VariationRequest,
)
from llamagen.serving.settings import ServerSettings
from llamagen.serving.uploads import form_schema, read_form, unpacked
from llamagen.support.errors import InputError
from llamagen.support.pictures import image_bytes

_log = logging.getLogger(__name__)

_Made = tuple[Update, Image.Image]
_Body = ImageRequest | EditRequest | VariationRequest

_EDIT_FILES = {"image": True, "mask": False}
_VARIATION_FILES = {"image": True}
_OPTIONS = {
    "inpaint": (),
    "complete": ("keep_rows",),
    "outpaint": ("below", "right"),
    "vary": ("keep",),
}
"""What only some edits take."""
_MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
ERRORS: dict[int | str, dict[str, Any]] = {
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
"""What an answer can be beside a success, for the API's description."""


class NoModelError(HTTPException):
    """No such model is served."""


class Served:
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
            raise NoModelError(404, f"there is no model {name!r}; choose one of /v1/models")
        return self.models[name]


def add_image_routes(app: FastAPI, served: Served) -> None:
    """Adds the endpoints."""
    asked: dict[str, Any] = {
        "response_model": ImagesResponse,
        "response_model_exclude_none": True,
        "tags": ["images"],
    }
    answers: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        **ERRORS,
    }

    @app.post("/v1/images/generations", responses=answers, **asked)
    async def generate(body: ImageRequest, request: Request) -> Any:
        """Draws images.

        With ``stream`` the answer is a stream of events: ``image_generation.partial_image`` as
        rows are finished, ``image_generation.completed`` for each image.
        """
        return await _answer(served, body, request)

    @app.post(
        "/v1/images/edits",
        responses=answers,
        openapi_extra=form_schema(EditRequest, _EDIT_FILES),
        **asked,
    )
    async def edit(request: Request) -> Any:
        """Draws a part of an image anew, or what is around it.

        Where ``mask`` is transparent, or white if it has no transparency, ``inpaint`` draws anew.
        With ``stream`` the answer is a stream of events: ``image_edit.partial_image`` as rows are
        finished, ``image_edit.completed`` for each image.
        """
        body, files = await read_form(request, EditRequest, _EDIT_FILES)
        kind = _kind_of_edit(body, masked="mask" in files)
        most, longest = served.settings.max_upload_pixels, served.settings.max_extension

        def prepare(editor: Editor) -> Edit:
            if kind == "outpaint":
                _check_extension(editor, body, longest)
            image = unpacked(files.pop("image"), "image", most=most)
            if kind == "inpaint":
                mask = unpacked(files.pop("mask"), "mask", most=most, as_it_is=True)
                return editor.inpainting(image, mask)
            if kind == "complete":
                return editor.completion(image, keep_rows=body.keep_rows)
            if kind == "outpaint":
                return editor.outpainting(image, below=body.below or 0, right=body.right or 0)
            return editor.variation(image, keep=0.5 if body.keep is None else body.keep)

        if kind == "inpaint" and body.best_of is None:
            body.best_of = INPAINTING_CANDIDATES
        return await _answer(served, body, request, prepare)

    @app.post(
        "/v1/images/variations",
        responses=ERRORS,
        openapi_extra=form_schema(VariationRequest, _VARIATION_FILES),
        **asked,
    )
    async def vary(request: Request) -> Any:
        """Keeps codes of an image here and there and draws the others."""
        body, files = await read_form(request, VariationRequest, _VARIATION_FILES)

        def prepare(editor: Editor) -> Edit:
            image = unpacked(files.pop("image"), "image", most=served.settings.max_upload_pixels)
            return editor.variation(image, keep=0.5 if body.keep is None else body.keep)

        return await _answer(served, body, request, prepare)

    @app.get(
        "/v1/files/{name}",
        response_class=Response,
        responses={404: ERRORS[404], 200: {"content": {"image/png": {}}}},
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


def _kind_of_edit(body: EditRequest, *, masked: bool) -> str:
    """Raises InputError if the request has what this kind does not take."""
    kind = body.edit or ("inpaint" if masked else "complete")
    if masked and kind != "inpaint":
        raise InputError(f"mask goes with edit inpaint, and this is {kind}; leave it out")
    if not masked and kind == "inpaint":
        raise InputError("mask is missing; send an image file that marks what is to be drawn anew")
    for owner, names in _OPTIONS.items():
        for name in names:
            if owner != kind and getattr(body, name) is not None:
                raise InputError(f"{name} goes with edit {owner}, and this is {kind}; leave it out")
    return kind


def _check_extension(editor: Editor, body: EditRequest, longest: int) -> None:
    """Raises InputError if more is to be drawn than the server allows."""
    for name, own in zip(("below", "right"), editor.pipeline.transformer.config.grid, strict=True):
        wanted = getattr(body, name) or 0
        if wanted > longest * own:
            raise InputError(f"{name} is {wanted}, but this server draws {longest * own} at most")


async def _answer(
    served: Served,
    body: _Body,
    request: Request,
    edit: Callable[[Editor], Edit] | None = None,
) -> Any:
    """What a request for images is answered with."""
    model = served.model(body.model)
    status = 500
    try:
        job = await _job(model, body, served.settings, edit)
        room = model.reserve(job)
        if getattr(body, "stream", False):
            status = 200
            return _EventStream(_events(model, job, body, room, served.settings.timeout), room)
        with room:
            made = await _unless_gone(request, _all_images(model, job, served.settings.timeout))
            room.made = True
        status = 200
        files = await asyncio.to_thread(_files, model, job, body, made)
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


async def _job(
    model: ServedModel,
    body: _Body,
    settings: ServerSettings,
    edit: Callable[[Editor], Edit] | None,
) -> Job:
    """What a request asks for.

    Raises:
        InputError: it asks for what there is not.
    """
    images = body.n or 1
    if images > settings.max_images:
        raise InputError(f"n is {images}, but a request may ask for {settings.max_images} at most")
    for name in ("prompt", "negative_prompt", "blend"):
        if len(getattr(body, name) or "") > settings.max_prompt:
            raise InputError(f"{name} has more than {settings.max_prompt} characters; shorten it")
    if body.blend_share is not None and body.blend is None:
        raise InputError("blend_share goes with blend; name what to blend with")
    job = await model.job(
        body.prompt,
        body.negative_prompt,
        images=images,
        seed=body.seed,
        settings=body.given_settings(),
        blend=body.blend,
        blend_share=0.5 if body.blend_share is None else body.blend_share,
        best_of=body.best_of or 1,
        rank_by=body.rank_by or "likelihood",
        edit=edit,
    )
    size = model.size_of(model.grid_of(job))
    if body.size not in (None, "auto", size):
        what = f"{model.name} draws" if edit is None else f"this edit by {model.name} gives"
        raise InputError(f"size is {body.size!r}, but {what} {size}; use auto")
    return job


async def _all_images(model: ServedModel, job: Job, timeout: float) -> list[_Made]:
    """All images of a job, in order; each is decoded as soon as it is drawn."""
    decoding: dict[int, asyncio.Task[_Made]] = {}

    async def decoded(update: Update) -> _Made:
        return update, await model.image(job, update)

    async with (
        asyncio.timeout(timeout),
        contextlib.aclosing(model.updates(job)) as updates,
    ):
        async for update in updates:
            if update.done:
                decoding[update.index] = asyncio.create_task(decoded(update))
        return [await decoding[index] for index in range(job.images)]


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
    body: _Body,
    files: Sequence[tuple[int, bytes]],
    request: Request,
    served: Served,
) -> ImagesResponse:
    kind = body.output_format or "png"
    data = []
    for seed, content in files:
        entry = ImageData(seed=seed)
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
        size=model.size_of(model.grid_of(job)),
        usage=_usage(model, job, len(files)),
        settings=dataclasses.asdict(job.sampling),
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
    body: _Body,
    room: Reservation,
    timeout: float,
) -> AsyncIterator[str]:
    """The events of a stream; also an error after the stream has begun is one."""
    wanted = _partial_rows(model.grid[0], getattr(body, "partial_images", None) or 0)
    shown = [0] * job.images
    try:
        async with (
            asyncio.timeout(timeout),
            contextlib.aclosing(model.updates(job)) as updates,
        ):
            async for update in updates:
                if update.rows in wanted or update.done:
                    yield await _event(model, job, body, update, shown)
        room.made = True
    # The status was sent long ago: the client is told in the stream.
    except Exception as error:  # noqa: BLE001
        _log.exception("a stream failed")
        message = "the images could not be drawn"
        if isinstance(error, InputError):
            message = str(error)
        elif isinstance(error, TimeoutError):
            message = "the images took too long"
        yield f"event: error\ndata: {json.dumps(error_body(message, 'server_error'))}\n\n"


async def _event(
    model: ServedModel, job: Job, body: _Body, update: Update, shown: list[int]
) -> str:
    image = await model.image(job, update)
    content = await asyncio.to_thread(_encoded, model, job, body, update.seed, image)
    what = "image_generation" if job.edit is None else "image_edit"
    kind = "completed" if update.done else "partial_image"
    event = ImageEvent(
        type=f"{what}.{kind}",  # type: ignore[arg-type]
        index=update.index,
        seed=update.seed,
        b64_json=base64.b64encode(content).decode(),
        created_at=int(time.time()),
        output_format=body.output_format or "png",
        size=model.size_of(model.grid_of(job)),
        partial_image_index=None if update.done else shown[update.index],
        rows=update.rows,
        usage=_usage(model, job, 1) if update.done else None,
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
    model: ServedModel, job: Job, body: _Body, made: Sequence[_Made]
) -> list[tuple[int, bytes]]:
    """Seed and file of each image."""
    return [(update.seed, _encoded(model, job, body, update.seed, image)) for update, image in made]


def _encoded(model: ServedModel, job: Job, body: _Body, seed: int, image: Image.Image) -> bytes:
    quality = 90 if body.output_compression is None else body.output_compression
    metadata = model.metadata(job, seed)
    return image_bytes(image, body.output_format or "png", quality=quality, metadata=metadata)


def _usage(model: ServedModel, job: Job, images: int) -> Usage:
    drawn = model.grid[0] * model.grid[1] * job.windows * job.best_of * images
    return Usage(
        input_tokens=job.input_tokens,
        input_tokens_details=TokenDetails(text_tokens=job.input_tokens),
        output_tokens=drawn,
        total_tokens=job.input_tokens + drawn,
    )
