"""Decoding for many clients: all that wait at a time are decoded together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from llamagen.config import Grid

Decode = Callable[[Tensor], list[Image.Image]]
"""Codes (images, rows, columns) to images; waits for the device."""


class _Wanted(NamedTuple):
    """Codes of which someone waits for the image."""

    codes: Sequence[int]
    grid: Grid
    future: asyncio.Future[Image.Image]


class ImageDecoder:
    """One thread that decodes while the engine goes on."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="llamagen-decoder")
        self._waiting: list[_Wanted] = []
        self._worker: asyncio.Task[None] | None = None

    async def decode(self, codes: Sequence[int], grid: Grid) -> Image.Image:
        """Return the image of the first rows of a grid's codes, grey where the others would be."""
        future: asyncio.Future[Image.Image] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Wanted(codes, grid, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    def close(self) -> None:
        """Let the thread end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = [each for each in self._waiting if not each.future.done()]
            self._waiting = []
            # Images of one size are decoded together.
            for grid in dict.fromkeys(each.grid for each in batch):
                group = [each for each in batch if each.grid == grid]
                codes = [each.codes for each in group]
                try:
                    images = await loop.run_in_executor(self._pool, self._images, codes, grid)
                except Exception as error:  # noqa: BLE001
                    for each in group:
                        if not each.future.done():
                            each.future.set_exception(error)
                    continue
                for each, image in zip(group, images, strict=True):
                    if not each.future.done():
                        each.future.set_result(image)

    def _images(self, batch: list[Sequence[int]], shape: Grid) -> list[Image.Image]:
        rows, columns = shape
        grids = torch.empty(len(batch), rows, columns, dtype=torch.int64)
        for grid, codes in zip(grids, batch, strict=True):
            done = len(codes) // columns
            grid[:done] = torch.tensor(codes).view(done, columns)
            # The last row again: its lower edge then looks as if the image went on.
            grid[done:] = grid[done - 1]
        images = self._decode(grids)
        for image, codes in zip(images, batch, strict=True):
            top = round(image.height * (len(codes) // columns) / rows)
            if top < image.height:
                image.paste((128, 128, 128), (0, top, image.width, image.height))
        return images
