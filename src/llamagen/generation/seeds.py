"""Random numbers that belong to an image, not to a batch, a device or a process."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamagen.support.errors import InputError
from llamagen.support.values import plain

MAX_SEED = 2**63 - 1


Generators = torch.Generator | Sequence[torch.Generator]
"""As diffusers takes them in the place of seeds: one, or one for each image."""


def check_seed(seed: Any) -> int:
    """Return ``seed`` as Python's integer; InputError unless it is one from 0 to 2^63 - 1."""
    number = plain(seed)
    if not isinstance(number, int) or not 0 <= number <= MAX_SEED:
        raise InputError(f"seed is {number!r}, expected an integer from 0 to {MAX_SEED}")
    return number


def one_seed_each(
    seed: int | Sequence[int] | None, count: int, generator: Generators | None = None
) -> tuple[int, ...]:
    """Return a seed for each of ``count`` images.

    ``seed`` is that of the first, and the next get the next numbers; or None for a random one; or
    as many as there are images, else InputError is raised. A ``generator`` draws it, or them.
    """
    given: Any = plain(seed)
    if generator is not None:
        if seed is not None:
            raise InputError("seed and generator were both given; give one of them")
        given = generator
    if given is None:
        # Small enough to be typed again.
        given = secrets.randbelow(2**31)
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        first = check_seed(_drawn(given))
        return tuple(range(first, first + count))
    seeds = tuple(check_seed(_drawn(each)) for each in given)
    if len(seeds) != count:
        raise InputError(f"{len(seeds)} seeds for {count} images; give one seed per image")
    return seeds


def _drawn(seed: Any) -> Any:
    """Return a seed, or the one that a generator draws."""
    if not isinstance(seed, torch.Generator):
        return seed
    return torch.randint(2**31, (), generator=seed, device=seed.device)


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
