"""Images by batches: ``generate_codes`` on vLLM.

The asynchronous engine on a thread of its own serves batches too: vLLM's other one knows no data
parallelism within a program.

Shapes: B images, C condition length.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from llamagen.checkpoints.sources import Source
from llamagen.config import Grid, SamplingConfig
from llamagen.generation import RowCallback
from llamagen.models.transformer import Transformer
from llamagen.support.errors import InputError
from llamagen.vllm_plugin.engine import VllmEngine

ResultT = TypeVar("ResultT")


class OfflineEngine:
    """A transformer on vLLM, for programs without an event loop."""

    def __init__(self, source: Source | Transformer, **options: Any) -> None:
        """Starts vLLM; arguments and errors are those of ``VllmEngine``."""
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="llamagen-vllm", daemon=True)
        thread.start()

        async def start() -> VllmEngine:
            return VllmEngine(source, **options)

        try:
            self._engine = self._run(start())
        except BaseException:
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise
        self._finish = weakref.finalize(self, _close, self._engine, self._loop)

    @property
    def grid(self) -> Grid:
        """Rows and columns of an image."""
        return self._engine.grid

    def close(self) -> None:
        """Ends vLLM's processes. Happens by itself when the program ends."""
        self._finish()

    def generate_codes(
        self,
        condition: Tensor,
        *,
        seeds: Sequence[int],
        sampling: SamplingConfig | None = None,
        condition_mask: Tensor | None = None,
        unconditional: Tensor | None = None,
        unconditional_mask: Tensor | None = None,
        grid: Grid | None = None,
        on_row: RowCallback | None = None,
    ) -> Tensor:
        """Draws one image's codes per row of ``condition``; returns them on the CPU.

        Arguments, result and errors are those of ``llamagen.generation.generate_codes``, but that
        ``sampling`` is the model's own by default, ``unconditional`` may have a length of its own
        (without a mask nothing of it is padding), ``grid`` can only be the engine's, and
        ``on_row`` is called on the engine's thread.
        """
        rows, columns = self.grid
        if grid is not None and tuple(grid) != self.grid:
            raise InputError(
                f"the grid is {grid[0]}x{grid[1]}, but this engine draws {rows}x{columns}; start "
                f"one whose model was exported with that grid"
            )
        images = condition.shape[0]
        if len(seeds) != images:
            raise InputError(f"{len(seeds)} seeds for {images} images; give one seed per image")
        wanted = _one_by_one(condition, condition_mask)
        others: Sequence[Tensor | None] = [None] * images
        if unconditional is not None:
            others = _one_by_one(unconditional, unconditional_mask)
            if len(others) != images:
                raise InputError(
                    f"{len(others)} negative conditions for {images} images; give one per image"
                )
        batch = _Batch(images, self.grid, on_row)

        async def draw(image: int) -> None:
            stream = self._engine.draw(
                wanted[image],
                seed=seeds[image],
                sampling=sampling or self._engine.sampling,
                unconditional=others[image],
            )
            async for drawn in stream:
                batch.put(image, drawn)

        async def draw_all() -> None:
            # The first failure ends the others' requests.
            async with asyncio.TaskGroup() as group:
                for image in range(images):
                    group.create_task(draw(image))

        try:
            self._run(draw_all())
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return batch.codes.view(images, rows, columns)

    def _run(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Waits for work on the engine's thread; whoever stops waiting ends the work."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


class _Batch:
    """Codes of images that come at their own pace, and who is told of rows that all have."""

    def __init__(self, images: int, grid: Grid, on_row: RowCallback | None) -> None:
        self.codes = torch.zeros(images, grid[0] * grid[1], dtype=torch.int64)
        self._grid, self._on_row = grid, on_row
        self._done = [0] * images

    def put(self, image: int, drawn: list[int]) -> None:
        """Takes all codes of an image so far, whole rows of them."""
        columns, before = self._grid[1], min(self._done)
        self._done[image] = len(drawn) // columns
        self.codes[image, : len(drawn)] = torch.tensor(drawn)
        if self._on_row is None:
            return
        for row in range(before + 1, min(self._done) + 1):
            shown = self.codes.clone()
            shown[:, row * columns :] = 0
            self._on_row(row, shown.view(-1, *self._grid))


def _one_by_one(condition: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The conditions of single images, without padding."""
    if condition.ndim < 3 or mask is None:
        return list(condition)
    if mask.shape != condition.shape[:2]:
        raise InputError(
            f"the condition mask has shape {tuple(mask.shape)}, "
            f"expected {tuple(condition.shape[:2])} like the text features"
        )
    return [features[kept] for features, kept in zip(condition, mask.bool(), strict=True)]


def _close(engine: VllmEngine, loop: asyncio.AbstractEventLoop) -> None:
    asyncio.run_coroutine_threadsafe(engine.close(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
