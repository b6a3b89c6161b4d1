"""The codes of any number of images, as many at a time as an engine has memory for."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from llamagen.config import SamplingConfig
from llamagen.pipeline.conditions import Conditions

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """A finished row of the grid, in one batch of a call."""

    first: int
    """Index of the batch's first image among the call's images."""
    row: int
    """Finished rows of the grid, from 1."""
    rows: int
    """Rows of the grid."""
    codes: Tensor
    """(images of the batch, rows, columns) int64; unfinished rows are zero."""


def draw_batches(
    draw: Callable[..., Tensor],
    conditions: Conditions,
    seeds: Sequence[int],
    sampling: SamplingConfig,
    *,
    size: int,
    known: Tensor | None = None,
    callback: Callable[[Progress], None] | None = None,
) -> Iterator[Tensor]:
    """Codes (images of the batch, rows, columns), batch by batch.

    A batch that overflows the GPU is halved, and so are those after it.

    Args:
        draw: ``generate_codes`` of a model or an engine.
        conditions: of all images.
        seeds: one per image.
        sampling: how codes are drawn.
        size: images of a batch, at most.
        known: (images, rows, columns) codes that stay, -1 where one is to be drawn.
        callback: called after each finished row of a batch.

    Raises:
        torch.OutOfMemoryError: one image alone does not fit.
    """
    first = 0
    while first < len(conditions):
        rows = slice(first, first + size)
        try:
            part = conditions[rows]
            codes = draw(
                part.condition,
                **part.arguments(),
                **({} if known is None else {"known": known[rows]}),
                seeds=seeds[rows],
                sampling=sampling,
                on_row=None if callback is None else _row_callback(callback, first),
            )
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = max(1, min(size, len(conditions) - first) // 2)
            _log.warning("out of GPU memory; going on with batches of %d", size)
            continue
        yield codes
        first += codes.shape[0]


def _row_callback(
    callback: Callable[[Progress], None], first: int
) -> Callable[[int, Tensor], None]:
    def on_row(row: int, codes: Tensor) -> None:
        callback(Progress(first=first, row=row, rows=codes.shape[1], codes=codes))

    return on_row
