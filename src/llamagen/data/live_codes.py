"""Codes that are made when they are read, instead of being stored.

Shapes: N images, rows x columns codes.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from llamagen.backends.cpu.convolution import accelerate
from llamagen.config import Grid, TransformerConfig
from llamagen.data.captions import Captions
from llamagen.data.images import ImageCollection, SkippedFiles
from llamagen.data.loader import ReadableImages
from llamagen.data.store import CodeStore
from llamagen.data.views import Views
from llamagen.models.tokenizer import ImageTokenizer, uint8_to_images
from llamagen.support.errors import InputError

_THREADS = 4
"""Threads that read images, unless more are asked for."""


class LiveCodes:
    """As ``CodeStore``, of images that are read and encoded again each time."""

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
        """Create the source; nothing is read yet.

        Args:
            tokenizer: identifies the codes.
            images: to encode.
            views: of which each image has one encoded at a time.
            skipped: lists damaged files.
            workers: threads that read images.
            encoder: the tokenizer in another precision, to encode with.
        """
        self._encoder = accelerate(encoder or tokenizer)
        self._images = images
        self._views = views
        self._skipped = skipped
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
        self.identity = hashlib.sha256(repr(known).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._images)

    @property
    def damaged(self) -> int:
        """Number of images that were found damaged so far."""
        return len(self._source.damaged)

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[Captions] | None:
        """Return the captions of some images; None for images without captions."""
        captions = self._images.captions
        return None if captions is None else [captions[index] for index in indices]

    def skipped(self) -> list[tuple[str, str]]:
        """Return nothing: damaged files are listed when they are read."""
        return []

    def check_fits(self, config: TransformerConfig) -> None:
        """Check nothing: the transformer is made for these codes."""
        del config

    def readable(self, indices: np.ndarray) -> np.ndarray:
        """Return these images, with the next that can be read in place of each that cannot.

        Raises:
            InputError: none can be read.
        """
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
        numbers = np.broadcast_to(np.asarray(views), len(indices))
        crops = [
            np.asarray(self._views.view(self._read[index], number))
            for index, number in zip(indices.tolist(), numbers.tolist(), strict=True)
        ]
        pixels = torch.from_numpy(np.stack(crops)).movedim(-1, 1)
        codes = self._encoder.encode(uint8_to_images(pixels.to(self._encoder.device)))
        return codes.cpu().numpy()


@dataclasses.dataclass(frozen=True)
class MemoryCodes:
    """As ``CodeStore``, of codes in memory."""

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

    def readable(self, indices: np.ndarray) -> np.ndarray:
        """Return these images."""
        return indices

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[Captions] | None:
        """See ``CodeStore.captions``."""
        return None if self.texts is None else [self.texts[index] for index in indices]

    def skipped(self) -> list[tuple[str, str]]:
        """Return nothing."""
        return []

    def check_fits(self, config: TransformerConfig) -> None:
        """Check nothing."""
        del config


CodeSource = CodeStore | LiveCodes | MemoryCodes
"""A source of codes to train on."""
