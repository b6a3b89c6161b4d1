"""A served model: pipeline, engine and decoder; the images of requests while they are generated.

Images of a request are generated side by side, each the best of some candidates. One that has
candidates, or several windows, is reported once, when it is done; other images also row by row.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing
from typing import Any

import numpy as np
import torch
from fastapi import HTTPException
from PIL import Image
from torch import Tensor

from llamagen.config import Grid, SamplingConfig, sampling_settings
from llamagen.generation.engine import Engine, EngineError
from llamagen.generation.request import UNKNOWN, one_seed_each
from llamagen.pipeline import Pipeline
from llamagen.pipeline.conditions import Condition
from llamagen.pipeline.editing import WHOLE, Edit, Editor, Window
from llamagen.pipeline.ranking import Ranking, check_ranking, score_images
from llamagen.serving.metrics import ServerMetrics
from llamagen.serving.schemas import RequestBody
from llamagen.support.errors import InputError, NotFiniteError

PlanEdit = Callable[[Editor], Edit]
"""Reads what is edited and how; waits for the model."""
Decode = Callable[[Tensor], list[Image.Image]]
"""Codes (images, rows, columns) to images; waits for the device."""


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """Images of one request."""

    condition: Condition
    seeds: tuple[int, ...]
    """Of all candidates: those of the first image, then those of the next."""
    sampling: SamplingConfig
    best_of: int
    """Candidates of each image."""
    rank_by: Ranking
    edit: Edit | None
    """None for images that are drawn from nothing."""
    grid: Grid
    begun: float
    """When it was asked for (``time.perf_counter``)."""

    @property
    def images(self) -> int:
        """Images that were asked for."""
        return len(self.seeds) // self.best_of

    @property
    def windows(self) -> int:
        """Windows of the model's grid in which an image is generated, one after another."""
        return 1 if self.edit is None else len(self.edit.windows)


@dataclasses.dataclass(frozen=True)
class Update:
    """Progress of an image of a job."""

    index: int
    """Of the image in the job."""
    seed: int
    rows: int
    """Finished rows of its codes, or as many codes in any order."""
    codes: list[int]
    """All codes in raster order, ``UNKNOWN`` where they are not drawn yet."""
    done: bool


class ImageDecoder:
    """One thread that decodes while the engine goes on."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="llamagen-decoder")
        self._waiting: dict[Grid, list[tuple[Sequence[int], asyncio.Future[Image.Image]]]] = {}
        """Codes, and who waits for their image; those of one size are decoded together."""
        self._worker: asyncio.Task[None] | None = None

    async def decode(self, codes: Sequence[int], grid: Grid) -> Image.Image:
        """Return the image of a grid's codes, grey where they are ``UNKNOWN``."""
        future: asyncio.Future[Image.Image] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(grid, []).append((codes, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    def close(self) -> None:
        """Let the thread end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            grid = next(iter(self._waiting))
            group = [each for each in self._waiting.pop(grid) if not each[1].done()]
            if not group:
                continue
            codes = [codes for codes, _ in group]
            try:
                images = await loop.run_in_executor(self._pool, self._images, codes, grid)
            except Exception as error:  # noqa: BLE001
                for _, future in group:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), image in zip(group, images, strict=True):
                if not future.done():
                    future.set_result(image)

    def _images(self, batch: list[Sequence[int]], shape: Grid) -> list[Image.Image]:
        rows, columns = shape
        codes = np.array(batch).reshape(-1, rows, columns)
        is_drawn = codes != UNKNOWN
        for grid, drawn in zip(codes, is_drawn, strict=True):
            # The nearest code again: the edge of what is drawn then looks as if the image went on.
            there, missing = np.argwhere(drawn), np.argwhere(~drawn)
            distances = ((missing[:, None] - there) ** 2).sum(axis=2)
            grid[~drawn] = grid[drawn][distances.argmin(axis=1)]
        images = self._decode(torch.from_numpy(codes))
        for image, drawn in zip(images, is_drawn, strict=True):
            if not drawn.all():
                mask = Image.fromarray(~drawn).resize(image.size, Image.Resampling.NEAREST)
                image.paste((128, 128, 128), mask=mask)
        return images


class ServedModel:
    """A model as the API uses it, which clients call ``name``.

    ``engine`` generates codes with the pipeline's transformer; ``max_in_flight`` limits the images
    that are accepted and not yet made, waiting ones among them.
    """

    def __init__(
        self,
        name: str,
        pipeline: Pipeline,
        engine: Engine,
        *,
        metrics: ServerMetrics,
        max_in_flight: int,
    ) -> None:
        self.name, self.pipeline, self.engine = name, pipeline, engine
        self.metrics, self.max_in_flight = metrics, max_in_flight
        self.grid, self.created = engine.grid, int(time.time())
        self.decoder = ImageDecoder(pipeline.decode)
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

    async def job(self, body: RequestBody, edit: PlanEdit | None = None) -> Job:
        """Return the job of a request, its prompt read, and its image if ``edit`` plans an edit.

        A prompt, a setting or an image that the model cannot take is an InputError.
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
        asked = {each.name: getattr(body, each.name) for each in sampling_settings()}
        sampling = self.pipeline.sampling.replace(**asked)
        loop = asyncio.get_running_loop()

        @torch.inference_mode()
        def read() -> Condition:
            share = 0.5 if body.blend_share is None else body.blend_share
            return self.pipeline.conditions(
                body.prompt, body.negative_prompt, blend=body.blend, blend_share=share
            )[0]

        condition = await loop.run_in_executor(self._reader, read)
        # Before a stream begins, whose status is sent first.
        self.engine.check(condition.request(seed=0, sampling=sampling))
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

    def reserve(self, job: Job) -> ExitStack:
        """Reserve room for a job's images, until the returned context ends.

        InputError if it never can; HTTPException 429, with Retry-After, if it cannot now.
        """
        images = len(job.seeds)
        if images > self.max_in_flight:
            each = f" with {job.best_of} candidates each" if job.best_of > 1 else ""
            limit = f"this server takes {self.max_in_flight} images at once"
            raise InputError(f"n is {job.images}{each}, but {limit}")
        if self._in_flight + images > self.max_in_flight:
            wait = max(1, min(60, round(self._seconds_per_image * images)))
            message = f"{self._in_flight} images are being drawn or wait already; try again later"
            raise HTTPException(429, message, {"Retry-After": str(wait)})
        self._count(images)
        room = ExitStack()
        room.callback(self._count, -images)
        return room

    def updates(self, job: Job) -> AsyncGenerator[Update, None]:
        """Generate a job's images side by side; yield an update for each finished row or image.

        An image that the engine refuses is an InputError, one that fails an EngineError.
        """
        return _RunningJob(self, job).updates()

    async def _best(self, job: Job, candidates: Tensor) -> int:
        """Return the index of the best of a job's ``candidates`` (best_of, rows, columns)."""

        # Ranking stores nothing in the model: the engine's thread may use it meanwhile.
        def best() -> int:
            conditions = [job.condition] * len(candidates)
            model = self.pipeline.transformer
            return int(score_images(model, candidates, conditions, job.rank_by).argmax())

        return await asyncio.get_running_loop().run_in_executor(self._worker, best)

    async def image(self, job: Job, update: Update) -> Image.Image:
        """Return an image of a job, grey where rows are missing."""
        image = await self.decoder.decode(update.codes, job.grid if update.done else self.grid)
        if job.edit is None or not update.done:
            return image
        return await asyncio.to_thread(job.edit.finish, image)

    def metadata(self, job: Job, seed: int) -> dict[str, Any]:
        """Return an image's metadata, the same as of ``Pipeline`` and ``Editor``."""
        made = self.pipeline.metadata(
            job.condition, seed, job.sampling, best_of=job.best_of, rank_by=job.rank_by
        )
        edit = {} if job.edit is None else {"edit": dict(job.edit.metadata)}
        return {**made, "model": self.name, **edit}

    async def close(self) -> None:
        """End all that runs."""
        await self.engine.close()
        self.decoder.close()
        for pool in (self._reader, self._worker):
            pool.shutdown(wait=False, cancel_futures=True)

    def _count(self, images: int) -> None:
        self._in_flight += images
        self.metrics.in_flight.labels(self.name).set(self._in_flight)

    def finished(self, job: Job) -> None:
        """Count the images of a job, all of which are made."""
        seconds = time.perf_counter() - job.begun
        self.metrics.images.labels(self.name).inc(job.images)
        self.metrics.total.labels(self.name).observe(seconds)
        self._seconds_per_image += 0.2 * (seconds / len(job.seeds) - self._seconds_per_image)


class _RunningJob:
    """A job while its images are generated."""

    def __init__(self, model: ServedModel, job: Job) -> None:
        self._model, self._job = model, job
        self._begun = False
        self._updates: asyncio.Queue[Update | BaseException] = asyncio.Queue()

    async def updates(self) -> AsyncGenerator[Update, None]:
        tasks = [asyncio.create_task(self._image(index)) for index in range(self._job.images)]
        try:
            left = len(tasks)
            while left:
                update = await self._updates.get()
                if isinstance(update, BaseException):
                    raise update
                left -= update.done
                yield update
        finally:
            await _end(tasks)

    async def _image(self, index: int) -> None:
        update: Update | Exception
        try:
            update = await self._generated(index)
        except Exception as error:  # noqa: BLE001
            update = error
            if not isinstance(error, InputError) or isinstance(error, NotFiniteError):
                # All that the client is told. A new one each time: the error may be that of other
                # images too, and its traceback would grow with each time it is raised.
                update = EngineError("the image could not be drawn")
                update.__cause__ = error
        self._updates.put_nowait(update)

    async def _generated(self, index: int) -> Update:
        """Generate the candidates of an image in each of its windows; keep the best of them."""
        job = self._job
        seeds = job.seeds[index * job.best_of : (index + 1) * job.best_of]
        windows: Sequence[Window] = (WHOLE,)
        whole = torch.full(self._model.grid, UNKNOWN)
        if job.edit is not None:
            windows, whole = job.edit.windows, job.edit.known(seeds[:1])[0]
        best = 0
        for window in windows:
            part = window.of(whole)
            known = None if job.edit is None else part.flatten()
            tasks = [
                asyncio.create_task(self._codes_of(index, window.seed(seed), known))
                for seed in seeds
            ]
            try:
                candidates = torch.tensor(await asyncio.gather(*tasks)).view(-1, *part.shape)
            finally:
                await _end(tasks)
            if len(candidates) > 1:
                best = await self._model._best(job, candidates)
            part.copy_(candidates[best])
        # An image of several windows may have the codes of several candidates.
        seed = seeds[0] if len(windows) > 1 or windows[0].number is not None else seeds[best]
        return Update(index, seed, len(whole), whole.flatten().tolist(), done=True)

    async def _codes_of(self, index: int, seed: int, known: Tensor | None) -> list[int]:
        job, (rows, columns) = self._job, self._model.grid
        request = job.condition.request(seed=seed, sampling=job.sampling, known_codes=known)
        name, metrics = self._model.name, self._model.metrics
        row_by_row = job.best_of == job.windows == 1
        codes: list[int] = []
        counted = 0
        with ExitStack() as waiting:
            waiting.enter_context(metrics.waiting.labels(name).track_inprogress())
            async with aclosing(self._model.engine.stream(request, client=self)) as stream:
                async for codes in stream:
                    drawn = len(codes) - codes.count(UNKNOWN)
                    waiting.close()
                    if not self._begun:
                        self._begun = True
                        metrics.wait.labels(name).observe(time.perf_counter() - job.begun)
                    metrics.codes.labels(name).inc(drawn - counted)
                    counted = drawn
                    if row_by_row and counted < rows * columns:
                        row = counted // columns
                        self._updates.put_nowait(Update(index, seed, row, codes, done=False))
        return codes


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
