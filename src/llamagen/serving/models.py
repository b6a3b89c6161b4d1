"""A model that is served: pipeline, engine and decoder, and the images it is busy with."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llamagen.conditions import Conditions
from llamagen.config import SamplingConfig
from llamagen.errors import InputError, NotFiniteError
from llamagen.pipeline import Pipeline
from llamagen.serving.decoding import ImageDecoder
from llamagen.serving.engine import CodeEngine, EngineError
from llamagen.serving.metrics import ServerMetrics

_SEEDS = 2**31


class QueueFullError(RuntimeError):
    """More images wait than the server lets wait."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which there is likely to be room."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Images of one request: what to draw, and how."""

    condition: Tensor
    """A label (), or text features (C, text_dim)."""
    unconditional: Tensor | None
    seeds: tuple[int, ...]
    sampling: SamplingConfig
    described: dict[str, Any]
    """What the images' metadata say of the prompt."""
    begun: float
    """When it was asked for (``time.perf_counter``)."""

    @property
    def input_tokens(self) -> int:
        """Positions of the condition."""
        return 1 if self.condition.ndim == 0 else len(self.condition)


@dataclasses.dataclass(frozen=True)
class Update:
    """An image of a job, as far as it is drawn."""

    index: int
    """Which image of the job."""
    rows: int
    """Finished rows of the grid."""
    codes: list[int]


class ServedModel:
    """What the API needs of a model."""

    def __init__(
        self,
        name: str,
        pipeline: Pipeline,
        engine: CodeEngine,
        *,
        metrics: ServerMetrics,
        max_in_flight: int,
    ) -> None:
        """Puts a model into service.

        Args:
            name: what clients call it.
            pipeline: reads prompts and decodes codes.
            engine: draws codes with the pipeline's transformer.
            metrics: of the server.
            max_in_flight: images accepted and not yet made, waiting ones among them.
        """
        self.name = name
        self.pipeline = pipeline
        self.engine = engine
        self.decoder = ImageDecoder(pipeline.decode, engine.grid)
        self.created = int(time.time())
        self._metrics = metrics
        self.max_in_flight = max_in_flight
        """Images accepted and not yet made, at most."""
        self._in_flight = 0
        self._seconds_per_image = 1.0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="llamagen-reader")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        return self.engine.grid

    @property
    def size(self) -> str:
        """Of an image, as "256x256"."""
        rows, columns = self.grid
        scale = self.pipeline.tokenizer.config.downsampling
        return f"{columns * scale}x{rows * scale}"

    async def job(
        self,
        prompt: str,
        negative_prompt: str | None,
        *,
        images: int,
        seed: int | None,
        settings: dict[str, Any],
    ) -> Job:
        """Reads a prompt.

        Args:
            prompt: a text, or a class by name or number.
            negative_prompt: as ``prompt``, or None.
            images: how many to draw.
            seed: of the first; random if None.
            settings: of ``SamplingConfig``, where the model's own are not wanted.

        Raises:
            InputError: the prompt or a setting is none that the model can take.
        """
        begun = time.perf_counter()
        sampling = dataclasses.replace(self.pipeline.sampling, **settings)
        first = secrets.randbelow(_SEEDS) if seed is None else seed
        loop = asyncio.get_running_loop()
        read = await loop.run_in_executor(self._reader, self._read, prompt, negative_prompt)
        return Job(
            condition=_only(read.condition, read.mask),
            unconditional=(
                None
                if read.unconditional is None
                else _only(read.unconditional, read.unconditional_mask)
            ),
            seeds=tuple(range(first, first + images)),
            sampling=sampling,
            described=read.described[0],
            begun=begun,
        )

    def reserve(self, job: Job) -> Reservation:
        """Room for a job's images, until it is released.

        Raises:
            InputError: there never is any for so many.
            QueueFullError: there is none now.
        """
        images = len(job.seeds)
        if images > self.max_in_flight:
            raise InputError(
                f"n is {images}, but this server takes {self.max_in_flight} images at once"
            )
        if self._in_flight + images > self.max_in_flight:
            wait = max(1, min(60, round(self._seconds_per_image * images)))
            raise QueueFullError(
                f"{self._in_flight} images are being drawn or wait already; try again later",
                retry_after=wait,
            )
        self._count(images)
        return Reservation(self, job)

    async def updates(self, job: Job) -> AsyncGenerator[Update, None]:
        """Draws a job's images side by side; tells of every finished row."""
        news: asyncio.Queue[Update | BaseException] = asyncio.Queue()
        request: Hashable = object()
        tasks = [
            asyncio.create_task(self._draw_one(job, index, request, news))
            for index in range(len(job.seeds))
        ]
        try:
            left, first = len(tasks), True
            while left:
                update = await news.get()
                if isinstance(update, BaseException):
                    raise update
                if first:
                    self._metrics.wait.labels(self.name).observe(time.perf_counter() - job.begun)
                    first = False
                left -= update.rows == self.grid[0]
                yield update
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def image(self, codes: Sequence[int]) -> Image.Image:
        """The image of some codes, grey where rows are missing."""
        return await self.decoder.decode(codes)

    def metadata(self, job: Job, index: int) -> dict[str, Any]:
        """What an image of a job says of itself, as those of ``Pipeline`` do."""
        return {
            "model": self.name,
            **job.described,
            "seed": job.seeds[index],
            **dataclasses.asdict(job.sampling),
            **self.pipeline.precision,
            "device": self.pipeline.device.type,
        }

    async def close(self) -> None:
        """Ends what is being drawn."""
        await self.engine.close()
        self.decoder.close()
        self._reader.shutdown(wait=False, cancel_futures=True)

    @torch.inference_mode()
    def _read(self, prompt: str, negative_prompt: str | None) -> Conditions:
        return self.pipeline.conditions(prompt, negative_prompt)

    async def _draw_one(
        self,
        job: Job,
        index: int,
        request: Hashable,
        news: asyncio.Queue[Update | BaseException],
    ) -> None:
        columns = self.grid[1]
        counted, waiting = 0, self._metrics.waiting.labels(self.name)
        waiting.inc()
        try:
            drawing = self.engine.draw(
                job.condition,
                seed=job.seeds[index],
                sampling=job.sampling,
                unconditional=job.unconditional,
                request=request,
            )
            async with aclosing(drawing):
                async for codes in drawing:
                    if counted == 0:
                        waiting.dec()
                    self._metrics.codes.labels(self.name).inc(len(codes) - counted)
                    counted = len(codes)
                    news.put_nowait(Update(index, counted // columns, codes))
        except Exception as error:  # noqa: BLE001
            if isinstance(error, InputError) and not isinstance(error, NotFiniteError):
                news.put_nowait(error)
            else:
                # The client, whose input is fine, is told no more than that. The error may be
                # that of other images too: raised anew each time, its traceback would grow.
                failure = EngineError("the image could not be drawn")
                failure.__cause__ = error
                news.put_nowait(failure)
        finally:
            if counted == 0:
                waiting.dec()

    def _count(self, images: int) -> None:
        self._in_flight += images
        self._metrics.in_flight.labels(self.name).set(self._in_flight)

    def _release(self, job: Job, *, made: bool) -> None:
        images = len(job.seeds)
        self._count(-images)
        if made:
            seconds = time.perf_counter() - job.begun
            self._metrics.images.labels(self.name).inc(images)
            self._metrics.total.labels(self.name).observe(seconds)
            self._seconds_per_image += 0.2 * (seconds / images - self._seconds_per_image)


class Reservation:
    """Room for the images of a request; a context manager."""

    def __init__(self, model: ServedModel, job: Job) -> None:
        self._model = model
        self._job = job
        self.made = False
        """Set when all images are made."""

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        self._model._release(self._job, made=self.made)


def _only(features: Tensor, mask: Tensor | None) -> Tensor:
    """The one condition of a batch of one, without its padding."""
    return features[0] if mask is None else features[0][mask[0].bool()]
