"""Collections of images that can be indexed, wherever they come from."""

from __future__ import annotations

import abc
import copy
import hashlib
from collections.abc import Iterator, Sequence
from typing import Self

from PIL import Image

from llamagen.data.captions import Captions


class ImageCollection(abc.ABC):
    """Images in a fixed order, with or without classes and captions.

    Sent to worker processes as a whole, so it holds names, not pixels.
    """

    name: str
    """Their source, for messages."""
    labels: tuple[int, ...] | None = None
    """Index into ``class_names`` per image; None for images without classes."""
    class_names: tuple[str, ...] = ()
    captions: tuple[Captions, ...] | None = None
    """Per image; None for images without captions."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def key(self, index: int) -> str:
        """Return a name of an image that is the same wherever the collection is."""

    @abc.abstractmethod
    def read(self, index: int) -> Image.Image:
        """Return the image as RGB.

        Raises:
            CorruptImageError: it cannot be read as an image.
            OSError: it cannot be reached.
        """

    @abc.abstractmethod
    def _select(self, indices: Sequence[int]) -> None:
        """Reduce this collection to some of its images; labels and captions follow."""

    def subset(self, indices: Sequence[int]) -> Self:
        """Return some of the images, in the order given."""
        part = copy.copy(self)
        part._select(indices)
        if self.labels is not None:
            part.labels = tuple(self.labels[i] for i in indices)
        if self.captions is not None:
            part.captions = tuple(self.captions[i] for i in indices)
        return part

    def split(self, fraction: float) -> tuple[Self, Self]:
        """Hold a part of the images out; return the rest and the part.

        The choice depends on the images' keys only, so every stage of training holds out the same.
        At least one image is held out if ``fraction`` is above 0, and one is kept.
        """
        rest, part = split_keys(list(self._keys()), fraction)
        return self.subset(rest), self.subset(part)

    def thinned(self, count: int) -> Self:
        """Return at most ``count`` images, spread evenly over the list and so over the classes."""
        return self.subset(spread(len(self), count))

    def digest(self) -> str:
        """Return a short text that changes when an image is added, removed or renamed."""
        whole = hashlib.sha256()
        for key in self._keys():
            whole.update(key_bytes(key) + b"\0")
        return whole.hexdigest()[:16]

    def _keys(self) -> Iterator[str]:
        return map(self.key, range(len(self)))


def split_keys(keys: Sequence[str], fraction: float) -> tuple[list[int], list[int]]:
    """Return the indices of the keys that are not held out, and of those that are."""
    wanted = held_out_count(len(keys), fraction)
    digests = [hashlib.sha256(key_bytes(key)).digest() for key in keys]
    by_hash = sorted(range(len(keys)), key=digests.__getitem__)
    return sorted(by_hash[wanted:]), sorted(by_hash[:wanted])


def spread(count: int, limit: int) -> list[int]:
    """Return at most ``limit`` indices, spread evenly over ``count``."""
    kept = min(limit, count)
    return [i * count // kept for i in range(kept)]


def held_out_count(count: int, fraction: float) -> int:
    """Return how many of ``count`` images a fraction of them is; neither none nor all."""
    return min(count - 1, max(1, round(fraction * count))) if fraction > 0 else 0


def key_bytes(key: str) -> bytes:
    """Return a key as bytes; names of files need not be valid text."""
    return key.encode("utf-8", "surrogateescape")
