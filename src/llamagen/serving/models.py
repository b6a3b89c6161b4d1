"""A model that is served: pipeline, engine and decoder, and the images it is busy with."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image

from llamagen.config import Grid
from llamagen.generation.engine import Engine
from llamagen.generation.seeds import one_seed_each
from llamagen.pipeline import Pipeline
from llamagen.pipeline.conditions import Condition
from llamagen.pipeline.editing import Edit, Editor
from llamagen.pipeline.ranking import Ranking, check_ranking
from llamagen.serving.decoding import ImageDecoder
from llamagen.serving.jobs import Job, Ranker, RunningJob, Update
from llamagen.serving.metrics import ServerMetrics
from llamagen.support.errors import InputError


class QueueFullError(RuntimeError):
    """More images wait than the server lets wait."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which there is likely to be room."""


class ServedModel:
    """What the API needs of a model."""

    def __init__(
        self,
        name: str,
        pipeline: Pipeline,
        engine: Engine,
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
        # One image at a time: what clients send may be large when it is unpacked.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="llamagen-worker")
        self._ranker = Ranker(pipeline.transformer, self._worker)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        return self.engine.grid

    @property
    def size(self) -> str:
        """Of an image, as "256x256"."""
        return self.size_of(self.grid)

    def size_of(self, grid: Grid) -> str:
        """Of an image with so many rows and columns of codes, as "256x256"."""
        rows, columns = grid
        scale = self.pipeline.tokenizer.config.downsampling
        return f"{columns * scale}x{rows * scale}"

    @property
    def edits(self) -> bool:
        """Whether it edits, blends and ranks."""
        return self.engine.can_edit

    async def job(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        *,
        images: int,
        seed: int | None = None,
        settings: Mapping[str, Any] | None = None,
        blend: str | None = None,
        blend_share: float = 0.5,
        best_of: int = 1,
        rank_by: Ranking = "likelihood",
        edit: Callable[[Editor], Edit] | None = None,
    ) -> Job:
        """Reads a prompt, and an image if one is edited.

        Args:
            prompt: a text, or a class by name or number.
            negative_prompt: as ``prompt``, or None.
            images: how many to draw.
            seed: of the first; random if None.
            settings: of ``SamplingConfig``, where the model's own are not wanted.
            blend: what the prompt is blended with, as ``prompt``; or None.
            blend_share: how much that counts.
            best_of: candidates of each image.
            rank_by: what the best of them is.
            edit: makes the edit, in another thread; None if the images are drawn from nothing.

        Raises:
            InputError: a prompt, a setting or the image is none that the model can take.
        """
        begun = time.perf_counter()
        if not self.edits and (edit or blend is not None or best_of > 1):
            raise InputError(
                f"the engine of {self.name} neither edits nor blends nor ranks; leave out blend "
                f"and best_of, or serve it with engine native"
            )
        check_ranking(rank_by, best_of)
        sampling = self.pipeline.sampling.replace(**(settings or {}))
        read = functools.partial(
            self._read,
            prompt,
            negative_prompt,
            blend=blend,
            blend_share=blend_share,
        )
        loop = asyncio.get_running_loop()
        condition = await loop.run_in_executor(self._reader, read)
        made = None
        if edit is not None:
            made = await loop.run_in_executor(self._worker, edit, Editor(self.pipeline))
        return Job(
            condition=condition,
            seeds=one_seed_each(seed, images * best_of),
            sampling=sampling,
            best_of=best_of,
            rank_by=rank_by,
            edit=made,
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
            asked = f"n is {job.images}"
            if job.best_of > 1:
                asked += f" with {job.best_of} candidates each"
            raise InputError(f"{asked}, but this server takes {self.max_in_flight} images at once")
        if self._in_flight + images > self.max_in_flight:
            wait = max(1, min(60, round(self._seconds_per_image * images)))
            raise QueueFullError(
                f"{self._in_flight} images are being drawn or wait already; try again later",
                retry_after=wait,
            )
        self._count(images)
        return Reservation(self, job)

    def updates(self, job: Job) -> AsyncGenerator[Update, None]:
        """Draws a job's images side by side; see ``RunningJob.updates``."""
        rank = self._ranker.best
        running = RunningJob(job, self.engine, model=self.name, metrics=self._metrics, rank=rank)
        return running.updates()

    async def image(self, job: Job, update: Update) -> Image.Image:
        """The image of a job, grey where rows are missing."""
        grid = self.grid_of(job) if update.done else self.grid
        image = await self.decoder.decode(update.codes, grid)
        if job.edit is None or not update.done:
            return image
        return await asyncio.to_thread(job.edit.finish, image)

    def grid_of(self, job: Job) -> Grid:
        """Rows and columns of codes of the images that a job makes."""
        if job.edit is None:
            return self.grid
        rows, columns = job.edit.codes.shape
        return rows, columns

    def metadata(self, job: Job, seed: int) -> dict[str, Any]:
        """What an image of a job says of itself, as those of ``Pipeline`` and ``Editor`` do."""
        ranked = {"best_of": job.best_of, "rank_by": job.rank_by}
        return {
            "model": self.name,
            **job.condition.metadata,
            "seed": seed,
            **dataclasses.asdict(job.sampling),
            **(ranked if job.best_of > 1 else {}),
            **self.pipeline.precision,
            "device": self.pipeline.device.type,
            **({} if job.edit is None else {"edit": dict(job.edit.metadata)}),
        }

    async def close(self) -> None:
        """Ends what is being drawn."""
        await self.engine.close()
        self.decoder.close()
        for pool in (self._reader, self._worker):
            pool.shutdown(wait=False, cancel_futures=True)

    @torch.inference_mode()
    def _read(self, prompt: str, negative_prompt: str | None, **others: Any) -> Condition:
        return self.pipeline.conditions(prompt, negative_prompt, **others)[0]

    def _count(self, images: int) -> None:
        self._in_flight += images
        self._metrics.in_flight.labels(self.name).set(self._in_flight)

    def _release(self, job: Job, *, made: bool) -> None:
        images = len(job.seeds)
        self._count(-images)
        if made:
            seconds = time.perf_counter() - job.begun
            self._metrics.images.labels(self.name).inc(job.images)
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
