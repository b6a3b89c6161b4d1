"""One image to be generated, in one value: everything that decides its codes.

Pipeline, editing, server, evaluation and engines make requests and pass them on unopened. The
random numbers belong to an image's seed, not to a batch, a device or a process.

Shapes: C condition length, T codes of an image.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamagen.config import Grid, Order, SamplingConfig, sampling_settings
from llamagen.models.transformer import Transformer
from llamagen.support.errors import InputError
from llamagen.support.values import plain

UNKNOWN = -1
"""Stands in known codes where a code is to be sampled."""
MAX_SEED = 2**63 - 1
Generators = torch.Generator | Sequence[torch.Generator]
"""As diffusers takes them in the place of seeds: one, or one for each image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationRequest:
    """One image's condition, seed and settings. An image's codes depend on its request only.

    Raises InputError if the seed, the share or the window lies outside its range.
    """

    condition: Tensor
    """A label (), or text features (C, text_dim) without padding."""
    seed: int
    """Decides, with everything else here, the image's codes; from 0 to 2^63 - 1."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How codes are sampled."""
    negative: Tensor | None = None
    """The condition that guidance leads away from (text features may have another length); by
    default the model's own "no class" or "no text"."""
    blend: Tensor | None = None
    """A second condition, like ``condition``, whose logits are mixed with those of the first:
    probabilities are in proportion to p1^(1 - share) p2^share."""
    blend_share: float = 0.5
    """How much the second condition counts, from 0 to 1."""
    known_codes: Tensor | None = None
    """(T,) or (rows, columns) int64 codes that stay, ``UNKNOWN`` where one is to be sampled."""
    window: int | None = None
    """Codes that a forward pass predicts (``schedules.jacobi``), which changes no code: 1 samples
    them one by one; by default more where that is faster."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not 0.0 <= self.blend_share <= 1.0:
            raise InputError(f"blend_share is {self.blend_share}, expected a number from 0 to 1")
        if self.window is not None and self.window < 1:
            raise InputError(f"window is {self.window}, expected at least 1 code")

    @property
    def conditions(self) -> list[Tensor]:
        """Those of its conditions that are given."""
        return [each for each in (self.condition, self.negative, self.blend) if each is not None]

    @property
    def condition_length(self) -> int:
        """Positions of the longest condition; a negative one of the model's own is as long."""
        return max(len(each) if each.ndim else 1 for each in self.conditions)

    @property
    def sequences(self) -> int:
        """Sequences of the transformer that it needs, at most."""
        return 1 + self.sampling.guided + (self.blend is not None)


def check_request(request: GenerationRequest, model: Transformer, grid: Grid) -> None:
    """Raise InputError if the model cannot take a request's conditions or known codes."""
    check_schedule(request.sampling, model.config.order, grid[0] * grid[1], request.window)
    for condition in request.conditions:
        model.cls_embedding.check(condition.unsqueeze(0))
    known, size = request.known_codes, model.config.codebook_size
    if known is None:
        return
    if tuple(known.shape) not in (grid, (grid[0] * grid[1],)):
        raise InputError(f"known codes have shape {tuple(known.shape)}, expected {grid}")
    smallest, largest = int(known.min()), int(known.max())
    if largest >= size or smallest < UNKNOWN:
        raise InputError(
            f"known codes reach from {smallest} to {largest}, expected codes below {size}, or "
            f"{UNKNOWN} where one is to be sampled"
        )


def check_schedule(
    sampling: SamplingConfig, order: Order, total: int, window: int | None = None
) -> None:
    """Raise InputError if settings do not go with a model of this order and ``total`` codes."""
    for setting in sampling_settings() if order == "raster" else ():
        value = getattr(sampling, setting.name)
        if setting.random_order and value != setting.default:
            raise InputError(
                f"{setting.name} is {value!r}, but this model predicts codes one by one in raster "
                f"order; use a model of random order"
            )
    if order == "random" and window is not None:
        raise InputError(
            f"window is {window}, but this model predicts codes in any order; say in how many "
            f"passes with steps"
        )
    if sampling.steps is not None and sampling.steps > total:
        raise InputError(
            f"steps is {sampling.steps}, expected at most the {total} codes of an image"
        )


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
