"""Codes of an image that are known before it is drawn: what editing keeps.

Shapes: B images, T codes of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llamagen.support.errors import InputError

UNKNOWN = -1
"""Stands where a code is to be drawn."""


class Given(NamedTuple):
    """Of which images of a batch the code at a place of the grid is known."""

    any: bool
    all: bool


def check_known(known: Tensor, shape: Sequence[int], codebook_size: int) -> None:
    """Checks codes of which some are known.

    Raises:
        InputError: they have another shape, or are no codes of a codebook of this size.
    """
    if tuple(known.shape) != tuple(shape):
        raise InputError(f"known codes have shape {tuple(known.shape)}, expected {tuple(shape)}")
    smallest, largest = int(known.min()), int(known.max())
    if largest >= codebook_size or smallest < UNKNOWN:
        raise InputError(
            f"known codes reach from {smallest} to {largest}, expected codes below "
            f"{codebook_size}, or {UNKNOWN} where one is to be drawn"
        )


def start_codes(
    known: Tensor | None, shape: tuple[int, int, int], codebook_size: int, device: torch.device
) -> tuple[Tensor, list[Given]]:
    """Codes (B, T) to start drawing with, and of each of the T places which of them are known.

    Args:
        known: of this shape, ``UNKNOWN`` where a code is to be drawn; None if all are.
        shape: images, rows, columns.
        codebook_size: of the model.
        device: where the codes are wanted.

    Raises:
        InputError: they have another shape, or are no codes of a codebook of this size.
    """
    images, total = shape[0], shape[1] * shape[2]
    if known is None:
        codes = torch.zeros(images, total, dtype=torch.int64, device=device)
        return codes, [Given(any=False, all=False)] * total
    check_known(known, shape, codebook_size)
    # A copy, which is filled in.
    codes = known.flatten(1).to("cpu", torch.int64, copy=True)
    there = codes != UNKNOWN
    given = [
        Given(any=some, all=every)
        for some, every in zip(there.any(0).tolist(), there.all(0).tolist(), strict=True)
    ]
    return codes.to(device), given
