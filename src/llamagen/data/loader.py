"""Batches of images, read and cropped in this process or in workers, with the same result.

Shapes: B images, V views of an image, H x W pixels.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llamagen.data.images import CorruptImageError, open_image
from llamagen.data.order import DataOrder, Draw
from llamagen.data.views import Augmentation, Views
from llamagen.errors import InputError


class ImageBatch(NamedTuple):
    """Images as they come from the files."""

    pixels: Tensor
    """(B, 3, H, W) bytes; (B, V, 3, H, W) where several views were asked for."""
    indices: Tensor
    """(B,) int64: which files."""
    skipped: tuple[CorruptImageError, ...]
    """The files that could not be read."""


def training_batches(
    paths: Sequence[Path],
    order: DataOrder,
    augmentation: Augmentation,
    *,
    first: int,
    last: int,
    workers: int = 0,
) -> Iterator[ImageBatch]:
    """The batches of the steps from ``first`` up to but not including ``last``.

    In the place of a file that cannot be read stands the next in the list that can: a choice
    that depends on nothing but the files, so it is the same after a restart.

    Raises:
        InputError: none of the files can be read.
    """
    dataset = _TrainingImages(paths, order, augmentation)
    for batch in _load(dataset, _Steps(order, first, last), workers):
        if len(batch.indices) == 0:
            raise InputError(
                f"none of the {len(paths)} image files can be read: {batch.skipped[0]}"
            )
        yield batch


def image_views(
    paths: Sequence[Path], views: Views, *, batch_size: int, workers: int = 0
) -> Iterator[ImageBatch]:
    """Every image that can be read, in order: pixels are (B, V, 3, H, W)."""
    indices = range(len(paths))
    batches = [indices[i : i + batch_size] for i in range(0, len(paths), batch_size)]
    yield from _load(_EveryImage(paths, views), batches, workers)


@dataclasses.dataclass(frozen=True)
class _Sample:
    pixels: np.ndarray | None
    index: int
    skipped: tuple[CorruptImageError, ...]


class _TrainingImages(Dataset[_Sample]):
    """Augmented images by their draws."""

    def __init__(self, paths: Sequence[Path], order: DataOrder, augmentation: Augmentation) -> None:
        self.paths = paths
        self.order = order
        self.augmentation = augmentation
        self.corrupt: set[int] = set()

    def __getitem__(self, draw: Draw) -> _Sample:
        skipped = []
        for offset in range(len(self.paths)):
            index = (draw.index + offset) % len(self.paths)
            # Reading a file again that was found damaged would cost time and change nothing.
            if index in self.corrupt:
                continue
            try:
                image = open_image(self.paths[index])
            except CorruptImageError as error:
                self.corrupt.add(index)
                skipped.append(error)
                continue
            crop = self.augmentation(image, self.order.random(draw))
            return _Sample(np.asarray(crop), index, tuple(skipped))
        return _Sample(None, draw.index, tuple(skipped))


class _EveryImage(Dataset[_Sample]):
    """All views of each image by its index."""

    def __init__(self, paths: Sequence[Path], views: Views) -> None:
        self.paths = paths
        self.views = views

    def __getitem__(self, index: int) -> _Sample:
        try:
            image = open_image(self.paths[index])
        except CorruptImageError as error:
            return _Sample(None, index, (error,))
        return _Sample(np.stack([np.asarray(v) for v in self.views(image)]), index, ())


class _Steps:
    """The draws of each step, made when they are needed."""

    def __init__(self, order: DataOrder, first: int, last: int) -> None:
        self.order, self.first, self.last = order, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[Draw]]:
        return map(self.order.batch, range(self.first, self.last))


def _load(dataset: Dataset[_Sample], batches: Any, workers: int) -> Iterator[ImageBatch]:
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_leave_signals_to_parent,
        # Its own: the loader draws a seed for its workers, which must not be taken from the
        # random numbers that the training uses.
        generator=torch.Generator(),
    )
    yield from loader


def _collate(samples: list[_Sample]) -> ImageBatch:
    """Channels first; files that could not be read are left out."""
    read = [sample for sample in samples if sample.pixels is not None]
    pixels = torch.empty(0, dtype=torch.uint8)
    if read:
        stacked = np.stack([sample.pixels for sample in read if sample.pixels is not None])
        pixels = torch.from_numpy(stacked).movedim(-1, -3)
    return ImageBatch(
        pixels,
        torch.tensor([sample.index for sample in read], dtype=torch.int64),
        tuple(error for sample in samples for error in sample.skipped),
    )


def _leave_signals_to_parent(_: int) -> None:
    """Ctrl-C reaches every process of the terminal; the parent decides when its workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
