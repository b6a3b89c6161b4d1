"""What a request wants drawn, and its drawing: images side by side, each the best of some.

Codes are drawn by an engine. Where an image has candidates, or is drawn place by place, it is
told of when it is done; other images also row by row.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing

import torch
from torch import Tensor

from llamagen.config import SamplingConfig
from llamagen.generation.engine import Engine, EngineError
from llamagen.generation.request import UNKNOWN, GenerationRequest
from llamagen.models.transformer import Transformer
from llamagen.pipeline.conditions import Condition
from llamagen.pipeline.editing import Edit, Window
from llamagen.pipeline.ranking import Ranking, score_images
from llamagen.serving.metrics import ServerMetrics
from llamagen.support.errors import InputError, NotFiniteError


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """Images of one request: what to draw, and how."""

    condition: Condition
    seeds: tuple[int, ...]
    """Of all candidates: those of the first image, then those of the next."""
    sampling: SamplingConfig
    best_of: int
    """Candidates of each image."""
    rank_by: Ranking
    edit: Edit | None
    """None for images that are drawn from nothing."""
    begun: float
    """When it was asked for (``time.perf_counter``)."""

    @property
    def images(self) -> int:
        """How many were asked for."""
        return len(self.seeds) // self.best_of

    def request(self, seed: int, known_codes: Tensor | None = None) -> GenerationRequest:
        """The request for one candidate."""
        return self.condition.request(seed=seed, sampling=self.sampling, known_codes=known_codes)

    @property
    def input_tokens(self) -> int:
        """Positions of the condition."""
        condition = self.condition.condition
        return 1 if condition.ndim == 0 else len(condition)

    @property
    def windows(self) -> int:
        """Places of the model's grid at which an image is drawn, one after another."""
        return 1 if self.edit is None else len(self.edit.windows)

    @property
    def row_by_row(self) -> bool:
        """Whether unfinished images can be shown."""
        return self.best_of == 1 and self.windows == 1


@dataclasses.dataclass(frozen=True)
class Update:
    """An image of a job, as far as it is drawn."""

    index: int
    """Which image of the job."""
    seed: int
    rows: int
    """Finished rows of its codes."""
    codes: list[int]
    """Those rows in raster order, or all codes of an image that is done."""
    done: bool


class RunningJob:
    """A job that is being drawn."""

    def __init__(
        self,
        job: Job,
        engine: Engine,
        *,
        model: str,
        metrics: ServerMetrics,
        rank: Callable[[Job, Tensor], Awaitable[int]],
    ) -> None:
        """Nothing is drawn yet.

        Args:
            job: what to draw.
            engine: draws codes.
            model: its name, for the metrics.
            metrics: of the server.
            rank: which of some candidates (best_of, rows, columns) is the best.
        """
        self._job = job
        self._engine = engine
        self._rank = rank
        self._metrics = metrics
        self._waiting = metrics.waiting.labels(model)
        self._codes = metrics.codes.labels(model)
        self._first_row = metrics.wait.labels(model)
        self._begun = False
        self._news: asyncio.Queue[Update | BaseException] = asyncio.Queue()

    async def updates(self) -> AsyncGenerator[Update, None]:
        """Draws the images; tells of what is finished.

        Raises:
            EngineError: an image could not be drawn.
            InputError: the engine refuses one.
        """
        tasks = [asyncio.create_task(self._image(index)) for index in range(self._job.images)]
        try:
            left = len(tasks)
            while left:
                update = await self._news.get()
                if isinstance(update, BaseException):
                    raise update
                left -= update.done
                yield update
        finally:
            await _end(tasks)

    async def _image(self, index: int) -> None:
        try:
            self._news.put_nowait(await self._drawn(index))
        except Exception as error:  # noqa: BLE001
            if isinstance(error, InputError) and not isinstance(error, NotFiniteError):
                self._news.put_nowait(error)
            else:
                # The client, whose input is fine, is told no more than that. The error may be
                # that of other images too: raised anew each time, its traceback would grow.
                failure = EngineError("the image could not be drawn")
                failure.__cause__ = error
                self._news.put_nowait(failure)

    async def _drawn(self, index: int) -> Update:
        """Draws the candidates of an image at each of its places, and takes the best of them."""
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
            there = window.of(whole)
            known = None if job.edit is None else there.flatten()
            candidates = await self._candidates(index, [window.seed(s) for s in seeds], known)
            if len(candidates) > 1:
                best = await self._rank(job, candidates)
            there.copy_(candidates[best])
        # Drawn at several places, it may have the codes of several candidates.
        seed = seeds[0] if len(windows) > 1 or windows[0].number is not None else seeds[best]
        return Update(index, seed, len(whole), whole.flatten().tolist(), done=True)

    async def _candidates(self, index: int, seeds: Sequence[int], known: Tensor | None) -> Tensor:
        """(candidates, rows, columns) codes of an image at one place."""
        tasks = [asyncio.create_task(self._codes_of(index, seed, known)) for seed in seeds]
        try:
            codes = await asyncio.gather(*tasks)
        finally:
            await _end(tasks)
        return torch.tensor(codes).view(len(seeds), *self._engine.grid)

    async def _codes_of(self, index: int, seed: int, known: Tensor | None) -> list[int]:
        job, (rows, columns) = self._job, self._engine.grid
        codes: list[int] = []
        counted = 0
        self._waiting.inc()
        try:
            stream = self._engine.stream(job.request(seed, known), client=self)
            async with aclosing(stream):
                async for codes in stream:
                    if counted == 0:
                        self._waiting.dec()
                        self._note_first_row()
                    self._codes.inc(len(codes) - counted)
                    counted = len(codes)
                    if job.row_by_row and counted < rows * columns:
                        row = counted // columns
                        self._news.put_nowait(Update(index, seed, row, codes, done=False))
        finally:
            if counted == 0:
                self._waiting.dec()
        return codes

    def _note_first_row(self) -> None:
        if not self._begun:
            self._begun = True
            self._first_row.observe(time.perf_counter() - self._job.begun)


class Ranker:
    """Finds the best of some candidates while the engine draws on.

    Ranking only reads the weights, and stores nothing in the model: the engine's thread may use it
    at the same time.
    """

    def __init__(self, model: Transformer, executor: Executor) -> None:
        """Ranks with ``model``, in a thread of ``executor``."""
        self._model = model
        self._executor = executor

    async def best(self, job: Job, candidates: Tensor) -> int:
        """Which of a job's ``candidates`` (best_of, rows, columns) is the best."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._best, job, candidates)

    def _best(self, job: Job, candidates: Tensor) -> int:
        conditions = [job.condition] * len(candidates)
        scores = score_images(self._model, candidates, conditions, job.rank_by)
        return int(scores.argmax())


async def _end(tasks: Sequence[asyncio.Task[object]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
