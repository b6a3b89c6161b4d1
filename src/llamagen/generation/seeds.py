"""Random numbers that belong to an image, not to a batch, a device or a process."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llamagen.support.errors import InputError

MAX_SEED = 2**63 - 1


def check_seed(seed: int) -> int:
    """Return ``seed``; raise InputError unless it lies between 0 and 2^63 - 1."""
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"seed is {seed}, expected an integer from 0 to {MAX_SEED}")
    return seed


def one_seed_each(seed: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Return a seed for each of ``count`` images.

    ``seed`` is that of the first, and the next get the next numbers; or None for a random one; or
    as many as there are images, else InputError is raised.
    """
    if seed is None:
        # Small enough to be typed again.
        seed = secrets.randbelow(2**31)
    if isinstance(seed, int):
        return tuple(range(seed, seed + count))
    if len(seed) != count:
        raise InputError(f"{len(seed)} seeds for {count} images; give one seed per image")
    return tuple(seed)


def derived_seed(seed: int, number: int) -> int:
    """Return one of many seeds that belong to ``seed``, with independent random numbers."""
    # From stream 2^63, which no draws are taken from.
    stream = np.random.Philox(counter=(1 << 255) + number, key=check_seed(seed))
    return int(stream.random_raw()) >> 1


def uniform_draws(seeds: Sequence[int], count: int, *, stream: int = 0) -> Tensor:
    """Return (images, count) float32 numbers in [0, 1): row i is a stream of ``seeds[i]``.

    Every seed has 2^64 independent streams, told apart by ``stream``.

    Philox in counter mode: the t-th number of a stream is the same whatever was drawn before it,
    on every platform and version. 24 bits each, so that every number is exact in float32.
    """
    # The counter's highest word, which counting in a stream never reaches.
    start = stream << 192
    streams = [np.random.Philox(counter=start, key=check_seed(seed)) for seed in seeds]
    bits = np.stack([each.random_raw(count) for each in streams]) >> np.uint64(40)
    return torch.from_numpy((bits * 2.0**-24).astype(np.float32))
