"""Batches of images, and the order in which training reads its data.

The order is a pure function of seed and step: a run that stopped after step n resumes with
``batch(n)``. The number of worker processes does not change the batches.

Shapes: B images, V views of an image, H x W pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llamagen.data.images import CorruptImageError, ImageCollection
from llamagen.data.views import Augmentation, Views
from llamagen.support.errors import InputError

_LAST_NUMBER = 2**64 - 1


@dataclasses.dataclass(frozen=True)
class Draw:
    """A sample in an epoch."""

    epoch: int
    index: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOrder:
    """Order of ``count`` samples, another random one each epoch.

    Batches cross the ends of epochs, so all are full and no sample is left out.
    """

    count: int
    batch_size: int
    seed: int
    group: int = 1
    """Number of consecutive batches sorted together by length, then shuffled."""
    lengths: Callable[[Sequence[int]], Sequence[int]] | None = None
    """Returns the lengths of samples by index; without it ``group`` has no effect."""

    def batch(self, step: int) -> list[Draw]:
        """Return the samples of a step, counted from 0."""
        if self.lengths is None or self.group == 1:
            return self._draws(step * self.batch_size, self.batch_size)
        group, number = divmod(step, self.group)
        size = self.group * self.batch_size
        draws = self._draws(group * size, size)
        lengths = self.lengths([draw.index for draw in draws])
        by_length = [draws[i] for i in np.argsort(lengths, kind="stable")]
        # Seeds from the other end than those of epochs.
        batches = _permutation(self.group, self.seed, _LAST_NUMBER - group)
        start = int(batches[number]) * self.batch_size
        return by_length[start : start + self.batch_size]

    def _draws(self, start: int, count: int) -> list[Draw]:
        places = (divmod(number, self.count) for number in range(start, start + count))
        return [
            Draw(epoch, int(_permutation(self.count, self.seed, epoch)[position]))
            for epoch, position in places
        ]

    def random(self, draw: Draw) -> random.Random:
        """Return the random generator of a sample in an epoch, for its crop, flip and view."""
        return random.Random(f"{self.seed} {draw.epoch} {draw.index}")  # noqa: S311


@functools.lru_cache(maxsize=8)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    # Unlike shuffles of numpy, Philox's raw numbers are the same in every version.
    numbers = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(count)
    return np.argsort(numbers, kind="stable")


class ImageBatch(NamedTuple):
    """A batch of images."""

    pixels: Tensor
    """(B, 3, H, W) or, with views, (B, V, 3, H, W) uint8."""
    indices: Tensor
    """(B,) int64, in the collection."""
    skipped: tuple[CorruptImageError, ...]
    """Errors of unreadable images."""


def training_batches(
    images: ImageCollection,
    order: DataOrder,
    augmentation: Augmentation,
    *,
    first: int,
    last: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[ImageBatch]:
    """Yield the batches of the steps from ``first`` up to but not including ``last``.

    An unreadable image is replaced by the next readable one of the collection; InputError if none
    is. ``workers`` processes read for this one, which gets its ``rank``-th share of every batch.
    """
    share = slice(*(order.batch_size * part // world_size for part in (rank, rank + 1)))
    batches = (order.batch(step)[share] for step in range(first, last))
    read = functools.partial(_augmented, ReadableImages(images), order, augmentation)
    for batch in load_batches(read, batches, workers):
        if len(batch.indices) == 0:
            raise InputError(f"none of the {len(images)} images can be read: {batch.skipped[0]}")
        yield batch


def image_views(
    images: ImageCollection,
    views: Views,
    *,
    batch_size: int,
    workers: int = 0,
    indices: Sequence[int] | None = None,
) -> Iterator[ImageBatch]:
    """Yield every readable image (or those of ``indices``): pixels (B, V, 3, H, W)."""
    chosen = range(len(images)) if indices is None else indices
    batches = (chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size))
    return load_batches(functools.partial(_all_views, images, views), batches, workers)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image of a batch, or the errors in its place."""

    pixels: np.ndarray | None
    """(H, W, 3) bytes, or (V, H, W, 3)."""
    index: int
    skipped: tuple[CorruptImageError, ...]


class ReadableImages:
    """Images of a collection, each unreadable one replaced by the next readable one."""

    def __init__(self, images: ImageCollection) -> None:
        self.images = images
        self.damaged: set[int] = set()
        """Indices of unreadable images found so far."""

    def read(self, wanted: int) -> tuple[int, Image.Image | None, tuple[CorruptImageError, ...]]:
        """Return the index of an image, the image (None if none is readable), and new errors."""
        errors: list[CorruptImageError] = []
        for offset in range(len(self.images)):
            index = (wanted + offset) % len(self.images)
            if index in self.damaged:
                continue
            try:
                return index, self.images.read(index), tuple(errors)
            except CorruptImageError as error:
                error.key = self.images.key(index)
                self.damaged.add(index)
                errors.append(error)
        return wanted, None, tuple(errors)


def _augmented(
    readable: ReadableImages, order: DataOrder, augmentation: Augmentation, draw: Draw
) -> Sample:
    index, image, skipped = readable.read(draw.index)
    crop = None if image is None else np.asarray(augmentation(image, order.random(draw)))
    return Sample(crop, index, skipped)


def _all_views(images: ImageCollection, views: Views, index: int) -> Sample:
    try:
        image = images.read(index)
    except CorruptImageError as error:
        error.key = images.key(index)
        return Sample(None, index, (error,))
    return Sample(np.stack([np.asarray(view) for view in views(image)]), index, ())


@dataclasses.dataclass
class _Samples(Dataset[Sample]):
    read: Callable[[Any], Sample]

    def __getitem__(self, key: Any) -> Sample:
        return self.read(key)


def load_batches(
    read: Callable[[Any], Sample], batches: Iterable[Sequence[Any]], workers: int
) -> Iterator[ImageBatch]:
    """Yield what ``read`` returns for the keys that ``batches`` lists, batch by batch."""
    loader = DataLoader(
        _Samples(read),
        batch_sampler=batches,  # type: ignore[arg-type]  # a list, says torch
        # More than there are cores would only compete.
        num_workers=min(workers, os.cpu_count() or 1),
        collate_fn=_collate,
        worker_init_fn=_leave_signals_to_parent,
        # The loader draws a seed for its workers: not from the generator of the training.
        generator=torch.Generator(),
    )
    yield from loader


def _collate(samples: list[Sample]) -> ImageBatch:
    """Stack readable images, channels first."""
    pixels = [sample.pixels for sample in samples if sample.pixels is not None]
    indices = [sample.index for sample in samples if sample.pixels is not None]
    return ImageBatch(
        torch.from_numpy(np.stack(pixels)).movedim(-1, -3) if pixels else torch.empty(0).byte(),
        torch.tensor(indices, dtype=torch.int64),
        tuple(error for sample in samples for error in sample.skipped),
    )


def _leave_signals_to_parent(_: int) -> None:
    """Ignore Ctrl-C, which every process of the terminal gets: the parent ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
