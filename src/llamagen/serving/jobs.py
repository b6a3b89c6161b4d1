"""The images of a request while they are generated: side by side, each the best of some.

An image that has candidates, or is generated in several windows, is reported once, when it is
done; other images also row by row.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import torch
from torch import Tensor

from llamagen.config import Grid, SamplingConfig
from llamagen.generation.engine import Engine, EngineError
from llamagen.generation.request import UNKNOWN
from llamagen.pipeline.conditions import Condition
from llamagen.pipeline.editing import Edit, Window
from llamagen.pipeline.ranking import Ranking
from llamagen.serving.metrics import ServerMetrics
from llamagen.support.errors import InputError, NotFiniteError


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
    """Rows and columns of codes of an image."""
    begun: float
    """When it was asked for (``time.perf_counter``)."""

    @property
    def images(self) -> int:
        """Images that were asked for."""
        return len(self.seeds) // self.best_of

    @property
    def input_tokens(self) -> int:
        """Positions of the condition."""
        condition = self.condition.condition
        return 1 if condition.ndim == 0 else len(condition)

    @property
    def windows(self) -> int:
        """Windows of the model's grid in which an image is generated, one after another."""
        return 1 if self.edit is None else len(self.edit.windows)

    @property
    def row_by_row(self) -> bool:
        """Whether unfinished images can be shown."""
        return self.best_of == 1 and self.windows == 1


@dataclasses.dataclass(frozen=True)
class Update:
    """Progress of an image of a job."""

    index: int
    """Of the image in the job."""
    seed: int
    rows: int
    """Finished rows of its codes."""
    codes: list[int]
    """Those rows in raster order, or all codes of an image that is done."""
    done: bool


class RunningJob:
    """A job while its images are generated."""

    def __init__(
        self,
        job: Job,
        engine: Engine,
        *,
        model: str,
        metrics: ServerMetrics,
        rank: Callable[[Job, Tensor], Awaitable[int]],
    ) -> None:
        self._job = job
        self._engine = engine
        self._rank = rank
        self._waiting = metrics.waiting.labels(model)
        self._codes = metrics.codes.labels(model)
        self._first_row = metrics.wait.labels(model)
        self._begun = False
        self._updates: asyncio.Queue[Update | BaseException] = asyncio.Queue()

    async def updates(self) -> AsyncGenerator[Update, None]:
        """Generate the images; yield an update for each finished row or image.

        Raises:
            EngineError: an image could not be generated.
            InputError: the engine refuses one.
        """
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
        try:
            self._updates.put_nowait(await self._generated(index))
        except Exception as error:  # noqa: BLE001
            if isinstance(error, InputError) and not isinstance(error, NotFiniteError):
                self._updates.put_nowait(error)
            else:
                # All that the client is told. A new one each time: the error may be that of other
                # images too, and its traceback would grow with each time it is raised.
                failure = EngineError("the image could not be drawn")
                failure.__cause__ = error
                self._updates.put_nowait(failure)

    async def _generated(self, index: int) -> Update:
        """Generate the candidates of an image in each of its windows; keep the best of them."""
        job = self._job
        seeds = job.seeds[index * job.best_of : (index + 1) * job.best_of]
        rows, columns = self._engine.grid
        windows: Sequence[Window] = [Window(slice(0, rows), slice(0, columns))]
        whole = torch.full((rows, columns), UNKNOWN)
        if job.edit is not None:
            windows = job.edit.windows
            whole = job.edit.known(seeds[:1])[0]
        best = 0
        for window in windows:
            part = window.of(whole)
            known = None if job.edit is None else part.flatten()
            tasks = [
                asyncio.create_task(self._codes_of(index, window.seed(seed), known))
                for seed in seeds
            ]
            try:
                candidates = torch.tensor(await asyncio.gather(*tasks)).view(-1, rows, columns)
            finally:
                await _end(tasks)
            if len(candidates) > 1:
                best = await self._rank(job, candidates)
            part.copy_(candidates[best])
        # An image of several windows may have the codes of several candidates.
        seed = seeds[0] if len(windows) > 1 or windows[0].number is not None else seeds[best]
        return Update(index, seed, len(whole), whole.flatten().tolist(), done=True)

    async def _codes_of(self, index: int, seed: int, known: Tensor | None) -> list[int]:
        job, (rows, columns) = self._job, self._engine.grid
        request = job.condition.request(seed=seed, sampling=job.sampling, known_codes=known)
        codes: list[int] = []
        counted = 0
        self._waiting.inc()
        try:
            async with aclosing(self._engine.stream(request, client=self)) as stream:
                async for codes in stream:
                    if counted == 0:
                        self._waiting.dec()
                    if not self._begun:
                        self._begun = True
                        self._first_row.observe(time.perf_counter() - job.begun)
                    self._codes.inc(len(codes) - counted)
                    counted = len(codes)
                    if job.row_by_row and counted < rows * columns:
                        row = counted // columns
                        self._updates.put_nowait(Update(index, seed, row, codes, done=False))
        finally:
            if counted == 0:
                self._waiting.dec()
        return codes


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
