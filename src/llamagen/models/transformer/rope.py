"""2-D rotary position embedding: half of a head's pairs rotate by the row, half by the column.

Shapes: B batch, T positions, H heads, E head dimension.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from llamagen.config import Grid


@functools.lru_cache(maxsize=32)
def rope_table(grid: Grid, head_dim: int, base: float, device: torch.device) -> Tensor:
    """Return cosines and sines of every cell: (rows * columns + 1, E / 2, 2), float32.

    With half = E / 2, the cell (r, c) rotates by the angles [r f, c f], where
    f_i = base^(-2 i / half) for i < half / 2 (rotary embedding: Su et al. 2104.09864).

    The last row, which the cell number -1 selects, is for conditions and holds *zeros*, not the
    cosine 1 of angle 0. The public checkpoints were trained that way: queries and keys of the
    condition are zero vectors, so each code attends to the condition with score 0 while its value
    counts in full.

    The table is a constant, cached per process; callers must not write to it.
    """
    # A table first made while sampling must also serve a later training step.
    with torch.inference_mode(False), torch.no_grad():
        half = head_dim // 2
        exponents = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
        frequencies = 1.0 / base**exponents  # (E / 4,)
        cells = torch.cartesian_prod(*(torch.arange(side, device=device) for side in grid))
        angles = (cells.unsqueeze(-1) * frequencies).flatten(1)  # (rows * columns, E / 2)
        table = torch.stack([angles.cos(), angles.sin()], dim=-1)
        return torch.cat([table, table.new_zeros(1, half, 2)])


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the interleaved pairs of ``x`` (B, T, H, E) by ``rope`` (T, E / 2, 2).

    ``rope`` may also be (B, T, E / 2, 2), where sequences are at different positions. Computed
    in float32, returned in the dtype of ``x``.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, H, E / 2) each
    cos, sin = rope.unsqueeze(-3).unbind(-1)  # (..., T, 1, E / 2) each
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).type_as(x)
