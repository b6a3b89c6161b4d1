"""Training batches from data that is streamed: shuffled, shared and resumed exactly.

The files are divided into parts. A part reads its files in another random order each epoch,
shuffles block after block of images, and supplies an equal share of every batch, so batches do not
depend on the number of processes. Resuming from the position of a part, which is four numbers,
reads at most a block again.

Shapes: B images, H x W pixels.
"""

from __future__ import annotations

import collections
import functools
import glob
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from llamagen.data import datasets_library as library
from llamagen.data.columns import SourceConfig
from llamagen.data.images import CorruptImageError
from llamagen.data.loader import ImageBatch, Sample, load_batches
from llamagen.data.views import Augmentation
from llamagen.support.content import files_digest
from llamagen.support.errors import InputError

T = TypeVar("T")

_AHEAD = 2
"""Batches that are read while another is used."""
_EMPTY_EPOCHS = 2
"""Epochs without a single image after which a part gives up."""


class Position(NamedTuple):
    """Position of a part: the start of a block, and an image in it."""

    epoch: int = 0
    file: int = 0
    """Index of one of the part's files, in this epoch's order."""
    row: int = 0
    """First row of the block."""
    taken: int = 0
    """Images of the block supplied so far."""


class _Streamed(NamedTuple):
    """An undecoded image."""

    value: Any
    name: str
    number: int
    """Number of the sample, counted over all steps."""


class ImageStream:
    """A streamed data set for training."""

    def __init__(
        self,
        source: str,
        config: SourceConfig,
        *,
        batch_size: int,
        seed: int,
        split: str | None = None,
    ) -> None:
        """Open the data set; InputError if it cannot be opened, or has no column of images."""
        dataset = library.load(source, split or config.split, config)
        if dataset.features is None:
            dataset = dataset._resolve_features()
        features, self.name = dataset.features, source
        self._column = library.image_column(features, config, source)
        self._features = sorted(features)
        columns = [name for name in (self._column, "__key__") if name in features]
        dataset = library.undecoded(dataset, self._column).select_columns(columns)
        count = dataset.num_shards
        self._files = [dataset.shard(num_shards=count, index=index) for index in range(count)]
        self._seed, self._batch_size = seed, batch_size
        limit = min(config.stream_parts, len(self._files))
        self.parts = next(n for n in range(limit, 0, -1) if batch_size % n == 0)
        self._block = max(1, config.shuffle_buffer // self.parts)
        self._positions = dict.fromkeys(range(self.parts), Position())

    def digest(self) -> str:
        """Return a text that depends on the numbers of files and parts, and on the columns."""
        return f"{len(self._files)} files in {self.parts} parts: {', '.join(self._features)}"

    def content_digest(self) -> str:
        """Return a text that depends on the content of the files that are on this machine."""
        path = Path(self.name)
        found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(self.name))  # noqa: PTH207
        files = sorted(each for each in found if each.suffix.lower() in library.FORMATS)
        return files_digest(path if path.is_dir() else path.parent, files)

    def state_dict(self) -> dict[int, tuple[int, ...]]:
        """Return the positions of this process's parts after its last batch."""
        return {part: tuple(at) for part, at in self._positions.items()}

    def load_state_dict(self, state: Mapping[int, Sequence[int]]) -> None:
        """Restore the positions of all processes together."""
        self._positions = {int(part): Position(*at) for part, at in state.items()}

    def first_images(self, count: int) -> Iterator[Any]:
        """Return undecoded images, in the data's own order."""
        rows = itertools.chain.from_iterable(self._files)
        return (row[self._column] for row in itertools.islice(rows, count))

    def training_batches(
        self,
        augmentation: Augmentation,
        *,
        first: int,
        last: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[ImageBatch]:
        """Yield batches; see ``loader.training_batches``.

        Unreadable images are replaced by others of the batch. InputError if the processes cannot
        share the parts evenly, or there are no images.
        """
        if self.parts % world_size:
            raise InputError(
                f"{self.name} is streamed in {self.parts} parts, which {world_size} processes "
                f"cannot share evenly; set `stream_parts` to a multiple of {world_size} that "
                f"divides the batch size (there are {len(self._files)} files)"
            )
        share = self.parts // world_size
        own = range(rank * share, (rank + 1) * share)
        self._positions = {part: self._positions[part] for part in own}
        after: collections.deque[dict[int, Position]] = collections.deque()

        def batches() -> Iterator[list[_Streamed]]:
            for samples, positions in ahead(self._read(own, first, last), _AHEAD):
                after.append(positions)
                yield samples

        read = functools.partial(_augmented, augmentation, self._seed)
        for batch in load_batches(read, batches(), workers):
            self._positions |= after.popleft()
            if len(batch.indices) == 0:
                raise InputError(f"no image of a batch can be read: {batch.skipped[0]}")
            rows = np.arange(self._batch_size // world_size) % len(batch.indices)
            yield batch._replace(pixels=batch.pixels[rows], indices=batch.indices[rows])

    def _read(
        self, own: Sequence[int], first: int, last: int
    ) -> Iterator[tuple[list[_Streamed], dict[int, Position]]]:
        """Yield the samples of some parts for each step, and their positions after it."""
        parts = {part: self._part(part, self._positions[part]) for part in own}
        share = self._batch_size // self.parts
        for step in range(first, last):
            samples, positions = [], {}
            for part, images in parts.items():
                for index in range(share):
                    value, name, positions[part] = next(images)
                    number = step * self._batch_size + part * share + index
                    samples.append(_Streamed(value, name, number))
            yield samples, positions

    def _part(self, part: int, position: Position) -> Iterator[tuple[Any, str, Position]]:
        """Yield a part's images endlessly: undecoded, with the name and the position after it."""
        empty = 0
        while empty < _EMPTY_EPOCHS:
            found = False
            for value, name, after in self._epoch(part, position):
                found = True
                yield value, name, after
            empty = 0 if found else empty + 1
            position = Position(epoch=position.epoch + 1)
        raise InputError(f"{self.name} has no images in some of its files")

    def _epoch(self, part: int, position: Position) -> Iterator[tuple[Any, str, Position]]:
        """Yield the rest of an epoch, block by block."""
        order = list(range(len(self._files)))
        random.Random(f"{self._seed} files {position.epoch}").shuffle(order)  # noqa: S311
        rows = self._rows(order[part :: self.parts], position)
        taken = position.taken
        while block := list(itertools.islice(rows, self._block)):
            start = Position(position.epoch, *block[0][1:])
            random.Random(f"{self._seed} {part} {start}").shuffle(block)  # noqa: S311
            for count in range(taken, len(block)):
                value, at, index = block[count]
                name = str(value.get("__key__", f"file {at} row {index}"))
                yield value[self._column], name, start._replace(taken=count + 1)
            taken = 0

    def _rows(self, files: Sequence[int], position: Position) -> Iterator[tuple[Any, int, int]]:
        """Yield rows of a part's files from a position on: the row, its file, its number."""
        for file in range(position.file, len(files)):
            first = position.row if file == position.file else 0
            for row, value in enumerate(self._files[files[file]].skip(first), first):
                yield value, file, row


def _augmented(augmentation: Augmentation, seed: int, image: _Streamed) -> Sample:
    try:
        decoded = library.decode(image.value, Path(image.name))
    except CorruptImageError as error:
        error.key = image.name
        return Sample(None, image.number, (error,))
    rng = random.Random(f"{seed} stream {image.number}")  # noqa: S311
    return Sample(np.asarray(augmentation(decoded, rng)), image.number, ())


def ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """Yield the same items; a thread fetches up to ``count`` in advance."""
    end: Any = object()
    pool = ThreadPoolExecutor(1)
    try:
        fetched = collections.deque(pool.submit(next, items, end) for _ in range(count))
        while (item := fetched.popleft().result()) is not end:
            fetched.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
