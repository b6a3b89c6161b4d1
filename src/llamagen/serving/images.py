"""The endpoints that make images: OpenAI's generations, edits and variations, and files."""

from __future__ import annotations

import asyncio
import base64
import bisect
import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, HTTPException, Path, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from llamagen.pipeline.editing import Edit, Editor
from llamagen.serving.files import FileStore, form_schema, open_upload, read_form
from llamagen.serving.guards import error_body
from llamagen.serving.leniency import settle
from llamagen.serving.metrics import ServerMetrics
from llamagen.serving.models import Job, PlanEdit, ServedModel, Update
from llamagen.serving.schemas import (
    EditRequest,
    ErrorResponse,
    ImageData,
    ImageEvent,
    ImageRequest,
    ImagesResponse,
    RequestBody,
    TokenDetails,
    Usage,
    VariationRequest,
)
from llamagen.serving.settings import ServerSettings
from llamagen.support.errors import InputError
from llamagen.support.pictures import image_bytes

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_EDIT_FILES = {"image": True, "mask": False}
_VARIATION_FILES = {"image": True}
_EDITS: dict[str, tuple[Callable[..., Edit], tuple[str, ...]]] = {
    "inpaint": (Editor.inpainting, ()),
    "complete": (Editor.completion, ("keep_rows",)),
    "outpaint": (Editor.outpainting, ("above", "below", "left", "right")),
    "vary": (Editor.variation, ("keep",)),
}
"""Kind of edit -> what plans it, and the fields that only it takes."""
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
"""Answers that are no success, for the API's description."""


class NoModelError(HTTPException):
    """Refusal of a request for a model that is not served."""


class Served:
    """Models, files and settings that the endpoints share."""

    def __init__(
        self, models: Sequence[ServedModel], metrics: ServerMetrics, settings: ServerSettings
    ) -> None:
        self.models = {model.name: model for model in models}
        self.metrics, self.settings = metrics, settings
        self.files = FileStore(lifetime=settings.file_lifetime, memory=settings.file_memory)

    def model(self, name: str | None) -> ServedModel:
        """Return a model; raise an HTTPException of status 404 if there is none of this name."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise NoModelError(404, f"there is no model {name!r}; choose one of /v1/models")
        return self.models[name]


def add_image_routes(app: FastAPI, served: Served) -> None:
    """Add the endpoints."""
    limits = served.settings
    post = functools.partial(
        app.post, response_model=ImagesResponse, response_model_exclude_none=True, tags=["images"]
    )
    stream = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
    answers = {200: stream, **ERRORS}

    @post("/v1/images/generations", responses=answers)
    async def generate(body: ImageRequest, request: Request) -> Any:
        """Draws images.

        With ``stream`` the answer is a stream of events: ``image_generation.partial_image`` as
        rows are finished, ``image_generation.completed`` for each image.
        """
        return await _answer(served, body, request)

    form = form_schema(EditRequest, _EDIT_FILES)

    @post("/v1/images/edits", responses=answers, openapi_extra=form)
    async def edit(request: Request) -> Any:
        """Draws a part of an image anew, or what is around it.

        Where ``mask`` is transparent, or white if it has no transparency, ``inpaint`` draws anew.
        With ``stream`` the answer is a stream of events: ``image_edit.partial_image`` as rows are
        finished, ``image_edit.completed`` for each image.
        """
        body, files = await read_form(request, EditRequest, _EDIT_FILES)
        kind = _kind_of_edit(body, masked="mask" in files)
        if kind == "inpaint" and body.best_of is None:
            body.best_of = Editor(served.model(body.model).pipeline).inpainting_candidates
        return await _answer(served, body, request, _planner(kind, body, files, limits))

    form = form_schema(VariationRequest, _VARIATION_FILES)

    @post("/v1/images/variations", responses=ERRORS, openapi_extra=form)
    async def vary(request: Request) -> Any:
        """Keeps codes of an image here and there and draws the others."""
        body, files = await read_form(request, VariationRequest, _VARIATION_FILES)
        return await _answer(served, body, request, _planner("vary", body, files, limits))

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
        headers = {"Cache-Control": "private", "X-Content-Type-Options": "nosniff"}
        return Response(found.content, media_type=found.media_type, headers=headers)


def _kind_of_edit(body: EditRequest, *, masked: bool) -> str:
    """Return the kind; raise InputError if the request has what this kind does not take."""
    kind = body.edit or ("inpaint" if masked else "complete")
    if masked and kind != "inpaint":
        raise InputError(f"mask goes with edit inpaint, and this is {kind}; leave it out")
    if not masked and kind == "inpaint":
        raise InputError("mask is missing; send an image file that marks what is to be drawn anew")
    for owner, (_, names) in _EDITS.items():
        for name in names:
            if owner != kind and getattr(body, name) is not None:
                raise InputError(f"{name} goes with edit {owner}, and this is {kind}; leave it out")
    return kind


def _planner(
    kind: str, body: EditRequest | VariationRequest, files: dict[str, bytes], limits: ServerSettings
) -> PlanEdit:
    """Return what plans an edit, in a thread that unpacks the images."""

    def plan(editor: Editor) -> Edit:
        method, names = _EDITS[kind]
        options = {name: value for name in names if (value := getattr(body, name)) is not None}
        grid = editor.pipeline.transformer.config.grid
        for name in ("above", "below", "left", "right"):
            longest = limits.max_extension * grid[name in ("left", "right")]
            if options.get(name, 0) > longest:
                raise InputError(
                    f"{name} is {options[name]}, but this server draws {longest} at most"
                )
        pixels = limits.max_upload_pixels
        images = [open_upload(files.pop("image"), "image", max_pixels=pixels)]
        if kind == "inpaint":
            images.append(open_upload(files.pop("mask"), "mask", max_pixels=pixels, convert=False))
        return method(editor, *images, **options)

    return plan


async def _answer(
    served: Served, body: RequestBody, request: Request, edit: PlanEdit | None = None
) -> Any:
    """Answer a request for images, at once or by a stream."""
    model, strict = served.model(body.model), served.settings.strict
    status = 500
    try:
        order = model.pipeline.transformer.config.order
        body, warnings = settle(body, order, strict=strict)
        job = await _job(model, body, served.settings, edit)
        size = model.size_of(job.grid)
        if body.size not in (None, "auto", size):
            what = f"{model.name} draws" if edit is None else f"this edit by {model.name} gives"
            warnings.append(f"size is {body.size!r}, but {what} {size}")
            if strict:
                raise InputError(f"{warnings[-1]}; use auto")
        room = model.reserve(job)
        images = _Images(model, job, body, served.settings.timeout, warnings)
        if getattr(body, "stream", False):
            status = 200
            return _EventStream(images.events(), room)
        with room:
            files = await _unless_gone(request, images.files())
        status = 200
        return images.response(files, served.files, str(request.base_url))
    except (InputError, HTTPException) as error:
        status = getattr(error, "status_code", 400)
        raise
    except TimeoutError as error:
        status = 504
        raise HTTPException(504, "the images took too long; ask for fewer") from error
    finally:
        served.metrics.requests.labels(model.name, str(status)).inc()


async def _job(
    model: ServedModel, body: RequestBody, settings: ServerSettings, edit: PlanEdit | None
) -> Job:
    """Return the job of a request; raise InputError if it is too large or cannot be done."""
    if (body.n or 1) > settings.max_images:
        raise InputError(f"n is {body.n}, but a request may ask for {settings.max_images} at most")
    for name in ("prompt", "negative_prompt", "blend"):
        if len(getattr(body, name) or "") > settings.max_prompt:
            raise InputError(f"{name} has more than {settings.max_prompt} characters; shorten it")
    return await model.job(body, edit)


class _Images:
    """Images of a request, on their way into its answer."""

    def __init__(
        self,
        model: ServedModel,
        job: Job,
        body: RequestBody,
        timeout: float,
        warnings: Sequence[str],
    ) -> None:
        self._model, self._job, self._body, self._timeout = model, job, body, timeout
        self._warnings = list(warnings) or None
        self._kind = body.output_format or "png"
        self._size = model.size_of(job.grid)

    async def files(self) -> list[tuple[int, bytes]]:
        """Return seed and file of all images, in order; each is decoded as soon as it is drawn."""
        making: dict[int, tuple[int, asyncio.Task[bytes]]] = {}
        async with (
            asyncio.timeout(self._timeout),
            contextlib.aclosing(self._model.updates(self._job)) as updates,
        ):
            async for update in updates:
                if update.done:
                    making[update.index] = update.seed, asyncio.create_task(self._file(update))
            files = [(seed, await file) for _, (seed, file) in sorted(making.items())]
        self._model.finished(self._job)
        return files

    def response(
        self, files: Sequence[tuple[int, bytes]], store: FileStore, base_url: str
    ) -> ImagesResponse:
        """Return the answer without a stream."""
        data = []
        for seed, content in files:
            if self._body.response_format == "url":
                name = store.add(content, f"image/{self._kind}")
                data.append(ImageData(seed=seed, url=f"{base_url}v1/files/{name}.{self._kind}"))
            else:
                data.append(ImageData(seed=seed, b64_json=base64.b64encode(content).decode()))
        return ImagesResponse(
            created=int(time.time()),
            data=data,
            model=self._model.name,
            output_format=self._kind,
            size=self._size,
            usage=self._usage(len(files)),
            settings=dataclasses.asdict(self._job.sampling),
            warnings=self._warnings,
        )

    async def events(self) -> AsyncIterator[str]:
        """Yield the events of a stream; also an error after the stream has begun is one."""
        rows = self._model.grid[0]
        count = min(getattr(self._body, "partial_images", None) or 0, rows - 1)
        partial = sorted({max(1, rows * (index + 1) // (count + 1)) for index in range(count)})
        shown, reached = [0] * self._job.images, [0] * self._job.images
        try:
            async with (
                asyncio.timeout(self._timeout),
                contextlib.aclosing(self._model.updates(self._job)) as updates,
            ):
                async for update in updates:
                    # A pass may finish several rows, so the next one is shown that reaches a mark.
                    marks = bisect.bisect_right(partial, update.rows)
                    if marks > reached[update.index] or update.done:
                        reached[update.index] = marks
                        event = await self._event(update, shown[update.index])
                        shown[update.index] += 1
                        data = event.model_dump_json(exclude_none=True)
                        yield f"event: {event.type}\ndata: {data}\n\n"
            self._model.finished(self._job)
        # The status was sent long ago: the client is told in the stream.
        except Exception as error:  # noqa: BLE001
            _log.exception("a stream failed")
            late = isinstance(error, TimeoutError)
            fault = "the images took too long" if late else "the images could not be drawn"
            message = str(error) if isinstance(error, InputError) else fault
            yield f"event: error\ndata: {json.dumps(error_body(message, 'server_error'))}\n\n"

    async def _event(self, update: Update, number: int) -> ImageEvent:
        what = "image_generation" if self._job.edit is None else "image_edit"
        kind = "completed" if update.done else "partial_image"
        return ImageEvent(
            type=f"{what}.{kind}",  # type: ignore[arg-type]
            index=update.index,
            seed=update.seed,
            b64_json=base64.b64encode(await self._file(update)).decode(),
            created_at=int(time.time()),
            output_format=self._kind,
            size=self._size,
            partial_image_index=None if update.done else number,
            rows=update.rows,
            usage=self._usage(1) if update.done else None,
            warnings=self._warnings if update.done else None,
        )

    async def _file(self, update: Update) -> bytes:
        image = await self._model.image(self._job, update)
        metadata = self._model.metadata(self._job, update.seed)
        compression = self._body.output_compression
        quality = 90 if compression is None else compression
        return await asyncio.to_thread(
            image_bytes, image, self._kind, quality=quality, metadata=metadata
        )

    def _usage(self, images: int) -> Usage:
        rows, columns = self._model.grid
        condition = self._job.condition.condition
        read = 1 if condition.ndim == 0 else len(condition)
        sampled = rows * columns * self._job.windows * self._job.best_of * images
        return Usage(
            input_tokens=read,
            input_tokens_details=TokenDetails(text_tokens=read),
            output_tokens=sampled,
            total_tokens=read + sampled,
        )


class _EventStream(StreamingResponse):
    """Server-sent events. The room that they need is released however the stream ends."""

    def __init__(self, events: AsyncIterator[str], room: contextlib.ExitStack) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._room:
            await super().__call__(scope, receive, send)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Return the result of ``work``; cancel it and raise HTTPException if the client hangs up."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the client has closed the connection")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
