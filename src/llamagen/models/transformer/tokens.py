"""Input of one step of a transformer: tokens, each with a cell of the grid and a position.

Shapes: N tokens of a step, M of them whose logits are wanted; as a rectangle R sequences of T.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
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

    def rectangle(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Arrange the tokens by sequences; shorter ones repeat their last token.

        Repeating is harmless: the same key and value are stored at the same position twice.

        Returns:
            The sequences (R,), their tokens (R, T), and row and column of those wanted, (M,) each.
        """
        numbers, starts, counts = np.unique(self.sequences, return_index=True, return_counts=True)
        columns = np.minimum(np.arange(counts.max()), counts[:, None] - 1)
        rows = np.repeat(np.arange(len(numbers)), counts)[self.wanted]
        return numbers, starts[:, None] + columns, rows, self.wanted - starts[rows]


def to_index(array: np.ndarray, device: torch.device) -> Tensor:
    """Return integers as an int64 tensor on ``device``, without waiting for it."""
    return torch.from_numpy(array.astype(np.int64)).to(device, non_blocking=True)
