"""A served model: pipeline, engine and decoder, and its images in flight."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llamagen.config import Grid
from llamagen.generation.engine import Engine
from llamagen.generation.seeds import one_seed_each
from llamagen.pipeline import Pipeline
from llamagen.pipeline.conditions import Condition
from llamagen.pipeline.editing import Edit, Editor
from llamagen.pipeline.ranking import check_ranking, score_images
from llamagen.serving.decoding import ImageDecoder
from llamagen.serving.jobs import Job, RunningJob, Update
from llamagen.serving.metrics import ServerMetrics
from llamagen.serving.schemas import RequestBody
from llamagen.support.errors import InputError


class QueueFullError(RuntimeError):
    """Refusal of a request because too many images wait."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which there is likely to be room."""


class ServedModel:
    """A model as the API uses it."""

    def __init__(
        self,
        name: str,
        pipeline: Pipeline,
        engine: Engine,
        *,
        metrics: ServerMetrics,
        max_in_flight: int,
    ) -> None:
        """Put a model into service.

        Args:
            name: what clients call it.
            pipeline: reads prompts and decodes codes.
            engine: generates codes with the pipeline's transformer.
            metrics: of the server.
            max_in_flight: images accepted and not yet made, waiting ones among them.
        """
        self.name = name
        self.pipeline = pipeline
        self.engine = engine
        self.grid = engine.grid
        self.created = int(time.time())
        self.max_in_flight = max_in_flight
        self._metrics = metrics
        self.decoder = ImageDecoder(pipeline.decode, engine.grid)
        self._in_flight = 0
        self._seconds_per_image = 1.0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="llamagen-reader")
        # One image at a time: what clients send may be large when it is unpacked.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="llamagen-worker")

    def size_of(self, grid: Grid) -> str:
        """Return the size of an image with so many rows and columns of codes, as "256x256"."""
        rows, columns = grid
        scale = self.pipeline.tokenizer.config.downsampling
        return f"{columns * scale}x{rows * scale}"

    async def job(self, body: RequestBody, edit: Callable[[Editor], Edit] | None = None) -> Job:
        """Return the job of a request, its prompt read, and its image if one is edited.

        Args:
            body: the request.
            edit: plans the edit, in another thread; None if no image is edited.

        Raises:
            InputError: the model cannot take a prompt, a setting or the image.
        """
        begun = time.perf_counter()
        images, best_of, rank_by = body.n or 1, body.best_of or 1, body.rank_by or "likelihood"
        if not self.engine.can_edit and (edit or body.blend is not None or best_of > 1):
            raise InputError(
                f"the engine of {self.name} neither edits nor blends nor ranks; leave out blend "
                f"and best_of, or serve it with engine native"
            )
        if body.blend_share is not None and body.blend is None:
            raise InputError("blend_share goes with blend; name what to blend with")
        check_ranking(rank_by, best_of)
        sampling = self.pipeline.sampling.replace(**body.given_settings())
        loop = asyncio.get_running_loop()

        @torch.inference_mode()
        def read() -> Condition:
            share = 0.5 if body.blend_share is None else body.blend_share
            return self.pipeline.conditions(
                body.prompt, body.negative_prompt, blend=body.blend, blend_share=share
            )[0]

        condition = await loop.run_in_executor(self._reader, read)
        plan, grid = None, self.grid
        if edit is not None:
            plan = await loop.run_in_executor(self._worker, edit, Editor(self.pipeline))
            grid = (plan.codes.shape[0], plan.codes.shape[1])
        return Job(
            condition=condition,
            seeds=one_seed_each(body.seed, images * best_of),
            sampling=sampling,
            best_of=best_of,
            rank_by=rank_by,
            edit=plan,
            grid=grid,
            begun=begun,
        )

    def reserve(self, job: Job) -> Reservation:
        """Reserve room for a job's images.

        Raises:
            InputError: the server never takes so many.
            QueueFullError: too many wait now.
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
        """Generate a job's images side by side; see ``RunningJob.updates``."""
        running = RunningJob(
            job, self.engine, model=self.name, metrics=self._metrics, rank=self._best
        )
        return running.updates()

    async def _best(self, job: Job, candidates: Tensor) -> int:
        """Return the index of the best of a job's ``candidates`` (best_of, rows, columns).

        Ranking stores nothing in the model, so that the engine's thread may use it meanwhile.
        """

        def best() -> int:
            conditions = [job.condition] * len(candidates)
            model = self.pipeline.transformer
            return int(score_images(model, candidates, conditions, job.rank_by).argmax())

        return await asyncio.get_running_loop().run_in_executor(self._worker, best)

    async def image(self, job: Job, update: Update) -> Image.Image:
        """Return an image of a job, grey where rows are missing."""
        grid = job.grid if update.done else self.grid
        image = await self.decoder.decode(update.codes, grid)
        if job.edit is None or not update.done:
            return image
        return await asyncio.to_thread(job.edit.finish, image)

    def metadata(self, job: Job, seed: int) -> dict[str, Any]:
        """Return an image's metadata, the same as of ``Pipeline`` and ``Editor``."""
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
        """End all that runs."""
        await self.engine.close()
        self.decoder.close()
        for pool in (self._reader, self._worker):
            pool.shutdown(wait=False, cancel_futures=True)

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
