"""Codes to images for many clients: what waits is decoded together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from llamagen.config import Grid


class Decode(Protocol):
    """Codes (images, rows, columns) to images."""

    def __call__(self, codes: Tensor) -> list[Image.Image]:
        """Waits for the device."""
        ...


class _Wanted(NamedTuple):
    """An image that someone waits for."""

    codes: Sequence[int]
    grid: Grid


class ImageDecoder:
    """One thread that decodes; meanwhile the engine draws on."""

    def __init__(self, decode: Decode, grid: Grid) -> None:
        self.grid = grid
        self._decode = decode
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="llamagen-decoder")
        self._waiting: list[tuple[_Wanted, asyncio.Future[Image.Image]]] = []
        self._busy = False

    async def decode(self, codes: Sequence[int], grid: Grid | None = None) -> Image.Image:
        """The image of some codes.

        Args:
            codes: whole rows of the grid from the first on. What is missing is left grey.
            grid: rows and columns, if they are not the usual ones.
        """
        future: asyncio.Future[Image.Image] = asyncio.get_running_loop().create_future()
        self._waiting.append((_Wanted(codes, grid or self.grid), future))
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
                wanted = [(each, future) for each, future in batch if not future.cancelled()]
                if not wanted:
                    continue
                try:
                    images = await loop.run_in_executor(
                        self._pool, self._all_images, [each for each, _ in wanted]
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

    def _all_images(self, batch: list[_Wanted]) -> list[Image.Image]:
        """Those of a size together."""
        found: dict[int, Image.Image] = {}
        for grid in dict.fromkeys(each.grid for each in batch):
            places = [place for place, each in enumerate(batch) if each.grid == grid]
            images = self._images([batch[place].codes for place in places], grid)
            found.update(zip(places, images, strict=True))
        return [found[place] for place in range(len(batch))]

    def _images(self, batch: list[Sequence[int]], shape: Grid) -> list[Image.Image]:
        rows, columns = shape
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
