"""The order in which training reads its data, as a pure function of seed and step.

Nothing here has state: a run that stops after step n goes on with ``batch(n)``, on any number of
worker processes, and needs to remember n only.
"""

from __future__ import annotations

import dataclasses
import functools
import random

import numpy as np


@dataclasses.dataclass(frozen=True)
class Draw:
    """One reading of one sample."""

    epoch: int
    """How often the whole data has been gone through before."""
    index: int
    """Which sample."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOrder:
    """Goes through ``count`` samples again and again, each time in another random order.

    Batches follow one another without regard to where one time through ends and the next begins,
    so every batch is full and no sample is left out.
    """

    count: int
    batch_size: int
    seed: int

    def batch(self, step: int) -> list[Draw]:
        """The samples of step ``step``, counted from 0."""
        draws = []
        for number in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, position = divmod(number, self.count)
            draws.append(Draw(epoch, int(_permutation(self.count, self.seed, epoch)[position])))
        return draws

    def random(self, draw: Draw) -> random.Random:
        """Random numbers for what is done to a sample this time: its crop, its flip, its view."""
        return random.Random(f"{self.seed} {draw.epoch} {draw.index}")  # noqa: S311


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    # Sorting Philox's raw numbers: unlike numpy's own shuffles, the same in every version.
    numbers = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(count)
    return np.argsort(numbers, kind="stable")
