"""Results for many images in files of some hundred each: resumable, and shared by processes."""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

import llamagen.support.storage as storage
from llamagen.support import distributed
from llamagen.support.errors import InputError

PIECE = 256
"""Images of a piece."""

MakePiece = Callable[[int, int, Callable[[int], object]], Mapping[str, np.ndarray]]
"""Computes the arrays of the images from one up to but not including another; reports how many more
are done."""


def digest(*parts: object) -> str:
    """Return a short text that changes with any of the parts, for names and comparisons."""
    text = " ".join(map(str, parts))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def bounds(number: int, count: int) -> tuple[int, int]:
    """Return the first image of a piece, and the one after its last, of ``count`` images."""
    return number * PIECE, min(count, (number + 1) * PIECE)


class Pieces:
    """The pieces of ``count`` images in a folder, each an .npz file of arrays."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return math.ceil(self.count / PIECE)

    def path(self, number: int) -> Path:
        """Return the file of a piece."""
        return self.folder / f"piece-{number:05d}.npz"

    def make(self, make_piece: MakePiece, description: str) -> None:
        """Compute the pieces that are not there yet; called in every process of a run.

        Each process computes its share and returns once all are there. Progress is shown on a
        terminal, under ``description``.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        storage.require_writable(self.folder)
        own = range(distributed.rank(), len(self), distributed.world_size())
        ranges = {number: bounds(number, self.count) for number in own}
        total = sum(last - first for first, last in ranges.values())
        # None: none where the output is no terminal.
        quiet = None if distributed.is_main() else True
        with tqdm(total=total, desc=description, unit="image", disable=quiet) as bar:
            done = 0
            for number, (first, last) in ranges.items():
                if not self.path(number).is_file():
                    self._write(number, make_piece(first, last, bar.update))
                done += last - first
                bar.update(done - bar.n)
        distributed.barrier()

    def _write(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        with storage.atomic_file(self.path(number)) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # names are ours

    def read(self, number: int) -> dict[str, np.ndarray]:
        """Return the arrays of a piece.

        Raises:
            InputError: it is missing or damaged; it is then removed, to be computed again.
        """
        path = self.path(number)
        try:
            with np.load(path) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            path.unlink(missing_ok=True)
            raise InputError(f"{path} is damaged ({error}); run the same command again") from error

    def rows(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """Return some rows, by default all, of an array that has one for each image.

        Raises:
            InputError: a piece is missing or damaged.
        """
        last = self.count if last is None else last
        parts = []
        for number in range(first // PIECE, (last - 1) // PIECE + 1):
            start, _ = bounds(number, self.count)
            parts.append(self.read(number)[name][max(first - start, 0) : last - start])
        return np.concatenate(parts)
