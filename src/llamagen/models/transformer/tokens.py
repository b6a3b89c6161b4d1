"""Input of one step of a transformer: tokens, each with a cell of the grid and a position.

Shapes: N tokens of a step, M of them whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

NO_CELL = -1
"""Cell of a condition: its queries and keys are zero (see ``rope``)."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a step. Those of a sequence are neighbours, in the order of their positions."""

    ids: Tensor
    """(N,) int64, on the model's device: c is code c; ``codebook_size + y`` is class y, where
    y = ``num_classes`` means "no class". Ignored where ``features`` are given."""
    sequences: np.ndarray
    """(N,) int32: the sequence of the cache that each belongs to, ascending."""
    positions: np.ndarray
    """(N,) int32: where its key and value are stored. It attends to all positions up to its own."""
    cells: np.ndarray
    """(N,) int32: the cell, in raster order, whose rotary angles apply; or ``NO_CELL``."""
    wanted: np.ndarray
    """(M,) int64: the tokens whose logits are returned."""
    features: Tensor | None = None
    """(N, text_dim): text features in the place of ids."""

    def __len__(self) -> int:
        return len(self.positions)
