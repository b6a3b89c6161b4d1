"""Sources of codes that are not stored: of images encoded on demand, and in memory.

Shapes: N images, rows x columns codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import llamagen.support.content as content
import llamagen.support.storage as storage
from llamagen.backends.cpu.convolution import accelerate
from llamagen.config import Grid
from llamagen.data.captions import Captions
from llamagen.data.images import ImageCollection, SkippedFiles
from llamagen.data.loader import ReadableImages
from llamagen.data.store import CodeSourceBase, CodeStore
from llamagen.data.views import Views
from llamagen.models.tokenizer import ImageTokenizer, uint8_to_images
from llamagen.support.errors import InputError

_THREADS = 4
"""Threads that read images, unless more are asked for."""


class LiveCodes(CodeSourceBase):
    """Source of codes, with the interface of ``CodeStore``, that encodes images on demand."""

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        images: ImageCollection,
        views: Views,
        *,
        skipped: SkippedFiles,
        workers: int = 0,
        encoder: ImageTokenizer | None = None,
    ) -> None:
        """Prepare; nothing is read.

        ``views`` are encoded one at a time, by ``encoder``, the tokenizer in another precision, if
        it is given. ``workers`` are threads that read images; damaged ones go to ``skipped``.
        """
        self._encoder = accelerate(encoder or tokenizer)
        self._images, self._views, self._skipped = images, views, skipped
        self._threads = ThreadPoolExecutor(workers or _THREADS)
        self._source = ReadableImages(images)
        self._read: dict[int, Image.Image] = {}
        self.folder = Path(images.name)
        self.views = len(views)
        self.grid: Grid = tokenizer.config.grid_of(views.height, views.width)
        self.codebook_size = tokenizer.config.codebook_size
        self.class_names = images.class_names
        self.labels = None if images.labels is None else np.array(images.labels, dtype=np.int64)
        known = (tokenizer.fingerprint(), images.digest(), views)
        names = storage.short_digest([repr(known).encode()])
        parts = [images.content_digest().encode(), images.annotations()]
        self.identity = content.identity(names, storage.short_digest(parts))

    def __len__(self) -> int:
        return len(self._images)

    @property
    def damaged(self) -> int:
        """Number of damaged images found so far."""
        return len(self._source.damaged)

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[Captions] | None:
        """Return the captions of some images; None for images without captions."""
        captions = self._images.captions
        return None if captions is None else [captions[index] for index in indices]

    def readable(self, indices: np.ndarray) -> np.ndarray:
        """Replace unreadable images by the next readable ones; InputError if there are none."""
        wanted = list(dict.fromkeys(indices.tolist()))
        self._read, found = {}, {}
        for index, result in zip(wanted, self._threads.map(self._source.read, wanted), strict=True):
            found[index], image, errors = result
            self._skipped.add(errors)
            if image is None:
                raise InputError(f"none of the {len(self)} images in {self.folder} can be read")
            self._read[found[index]] = image
        return np.array([found[index] for index in indices.tolist()])

    @torch.inference_mode()
    def rows(self, indices: np.ndarray, views: np.ndarray | int) -> np.ndarray:
        """Return codes (N, rows, columns) of a view of each image that ``readable`` returned."""
        pairs = np.broadcast(indices, views)
        crops = [np.asarray(self._views.view(self._read[i], number)) for i, number in pairs]
        pixels = torch.from_numpy(np.stack(crops)).movedim(-1, 1)
        codes = self._encoder.encode(uint8_to_images(pixels.to(self._encoder.device)))
        return codes.cpu().numpy()


@dataclasses.dataclass(frozen=True)
class MemoryCodes(CodeSourceBase):
    """Source of codes, with the interface of ``CodeStore``, in memory."""

    codes: np.ndarray
    """(N, views, rows, columns) integers."""
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    texts: Sequence[Captions] | None = None
    folder: Path = Path("memory")
    identity: str = "memory"

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def views(self) -> int:
        """Views of each image."""
        return self.codes.shape[1]

    @property
    def grid(self) -> Grid:
        """Rows and columns of an image's codes."""
        return self.codes.shape[2], self.codes.shape[3]

    def rows(self, indices: np.ndarray, views: np.ndarray | int) -> np.ndarray:
        """See ``CodeStore.rows``."""
        return self.codes[indices, views]

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[Captions] | None:
        """See ``CodeStore.captions``."""
        return None if self.texts is None else [self.texts[index] for index in indices]


CodeSource = CodeStore | LiveCodes | MemoryCodes
"""A source of codes to train on."""
