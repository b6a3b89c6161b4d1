"""Codes to images for many clients: what waits is decoded together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from llamagen.config import Grid


class Decode(Protocol):
    """Codes (images, rows, columns) to images."""

    def __call__(self, codes: Tensor) -> list[Image.Image]:
        """Waits for the device."""
        ...


class ImageDecoder:
    """One thread that decodes; meanwhile the engine draws on."""

    def __init__(self, decode: Decode, grid: Grid) -> None:
        self.grid = grid
        self._decode = decode
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="llamagen-decoder")
        self._waiting: list[tuple[Sequence[int], asyncio.Future[Image.Image]]] = []
        self._busy = False

    async def decode(self, codes: Sequence[int]) -> Image.Image:
        """The image of some codes.

        Args:
            codes: whole rows of the grid from the first on. What is missing is left grey.
        """
        future: asyncio.Future[Image.Image] = asyncio.get_running_loop().create_future()
        self._waiting.append((codes, future))
        if not self._busy:
            self._busy = True
            self._worker = asyncio.create_task(self._work())
        return await future

    def close(self) -> None:
        """Lets the thread end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                wanted = [(codes, future) for codes, future in batch if not future.cancelled()]
                if not wanted:
                    continue
                try:
                    images = await loop.run_in_executor(
                        self._pool, self._images, [codes for codes, _ in wanted]
                    )
                except Exception as error:  # noqa: BLE001
                    for _, future in wanted:
                        if not future.done():
                            future.set_exception(error)
                    continue
                for (_, future), image in zip(wanted, images, strict=True):
                    if not future.done():
                        future.set_result(image)
        finally:
            self._busy = False

    def _images(self, batch: list[Sequence[int]]) -> list[Image.Image]:
        rows, columns = self.grid
        grids = torch.empty(len(batch), rows, columns, dtype=torch.int64)
        for grid, codes in zip(grids, batch, strict=True):
            done = len(codes) // columns
            grid[:done] = torch.tensor(codes).view(done, columns)
            # The last row again: its lower edge then looks as if the image went on.
            grid[done:] = grid[done - 1]
        images = self._decode(grids)
        return [
            _unfinished_grey(image, len(codes) // columns / rows)
            for image, codes in zip(images, batch, strict=True)
        ]


def _unfinished_grey(image: Image.Image, done: float) -> Image.Image:
    """The image with everything below the share ``done`` of its height in one grey."""
    if done < 1:
        top = round(image.height * done)
        image.paste((128, 128, 128), (0, top, image.width, image.height))
    return image
