"""Order in which training reads its data: a pure function of seed and step.

Nothing here has state: a run that stops after step n goes on with ``batch(n)``, on any number of
worker processes.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence

import numpy as np

_LAST_NUMBER = 2**64 - 1


@dataclasses.dataclass(frozen=True)
class Draw:
    """One use of one sample."""

    epoch: int
    """Number of times that all samples were used before."""
    index: int
    """Of the sample."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOrder:
    """Order of ``count`` samples, another random one each epoch.

    Batches follow one another across the ends of epochs, so every batch is full and no sample is
    left out.
    """

    count: int
    batch_size: int
    seed: int
    group: int = 1
    """Number of consecutive batches that are sorted by length, then put in random order."""
    lengths: Callable[[Sequence[int]], Sequence[int]] | None = None
    """Return the lengths of samples by their indices; without it ``group`` has no effect."""

    def batch(self, step: int) -> list[Draw]:
        """Return the samples of step ``step``, counted from 0."""
        if self.lengths is None or self.group == 1:
            return self._draws(step * self.batch_size, self.batch_size)
        group, number = divmod(step, self.group)
        size = self.group * self.batch_size
        draws = self._draws(group * size, size)
        lengths = self.lengths([draw.index for draw in draws])
        by_length = [draws[i] for i in np.argsort(lengths, kind="stable")]
        # From the other end than the epochs' numbers.
        batches = _permutation(self.group, self.seed, _LAST_NUMBER - group)
        start = int(batches[number]) * self.batch_size
        return by_length[start : start + self.batch_size]

    def _draws(self, start: int, count: int) -> list[Draw]:
        draws = []
        for number in range(start, start + count):
            epoch, position = divmod(number, self.count)
            draws.append(Draw(epoch, int(_permutation(self.count, self.seed, epoch)[position])))
        return draws

    def random(self, draw: Draw) -> random.Random:
        """Return the generator for a sample in an epoch: for its crop, its flip, its view."""
        return random.Random(f"{self.seed} {draw.epoch} {draw.index}")  # noqa: S311


@functools.lru_cache(maxsize=8)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    # Sorting Philox's raw numbers: unlike numpy's own shuffles, the same in every version.
    numbers = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(count)
    return np.argsort(numbers, kind="stable")
