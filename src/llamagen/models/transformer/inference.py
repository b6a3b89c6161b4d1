"""What a step of inference works on: tokens, and the cache of keys and values.

Whoever generates owns both; neither is ever part of the model.

Shapes: N tokens of a step, M of them whose logits are wanted; as a rectangle R sequences of T; of
the cache S sequences there is room for, K key-value heads, L positions, E head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llamagen.config import TransformerConfig

NO_CELL = -1
"""Cell of a condition: its queries and keys are zero (see ``rope_table``)."""
QUERY = -1
"""Id of the query of a token's cell, whose logits predict the code there (``order`` "random")."""

_INT8_MAX = 127.0
_SMALLEST_SCALE = 1e-30
"""Largest magnitude assumed of keys and values that are all zero."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a step. Those of a sequence are neighbours, in the order of their positions."""

    ids: Tensor
    """(N,) int64, on the model's device: c is code c; ``codebook_size + y`` is class y, where
    y = ``num_classes`` means "no class"; or ``QUERY``. Ignored where ``features`` are given."""
    sequences: np.ndarray
    """(N,) int32: the sequence of the cache that each belongs to, ascending."""
    positions: np.ndarray
    """(N,) int32: where its key and value are stored. It attends to all positions up to its own."""
    cells: np.ndarray
    """(N,) int32: the cell, in raster order, whose rotary angles apply; or ``NO_CELL``."""
    wanted: np.ndarray
    """(M,) int64: the tokens whose logits are returned."""
    features: Tensor | None = None
    """(F, text_dim): text features of the F tokens of conditions, in the place of ids."""

    def __len__(self) -> int:
        return len(self.positions)

    def by_sequence(self) -> list[Tokens]:
        """Return the tokens of each sequence; those wanted must be in ascending order."""
        numbers = np.unique(self.sequences)
        texts = np.cumsum(self.cells == NO_CELL) * (self.features is not None)
        parts = []
        for number in numbers:
            first, end = np.searchsorted(self.sequences, [number, number + 1])
            own, before = slice(first, end), int(texts[first - 1]) if first else 0
            features = None if self.features is None else self.features[before : texts[end - 1]]
            wanted = self.wanted[(self.wanted >= first) & (self.wanted < end)] - first
            arrays = (self.sequences[own], self.positions[own], self.cells[own], wanted)
            parts.append(Tokens(self.ids[own], *arrays, features))
        return parts

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


class KVCache:
    """Keys and values of sequences, each with a length of its own; the first ones are in use.

    A batch whose sequences start together is the case where all lengths are equal. Positions behind
    a sequence's length may be written before they count: a step that looks ahead stores keys and
    values there, and ``lengths`` moves only over those that are final.

    In int8 each key and each value is integers times a scale of its own: half of bfloat16's memory.
    """

    def __init__(
        self,
        config: TransformerConfig,
        sequences: int,
        positions: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate S ``sequences`` of L ``positions``; ``dtype`` is the model's, or int8."""

        def allocate(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
            shape = (sequences, config.num_kv_heads, positions, *sizes)
            # Zeros: what attention masks out must still be finite.
            return [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]

        self.max_sequences, self.positions = sequences, positions
        self.lengths: list[int] = []
        """Positions filled of each sequence in use."""
        self.keys = allocate(config.head_dim, dtype=dtype)
        """One (S, K, L, E) tensor per layer."""
        self.values = allocate(config.head_dim, dtype=dtype)
        self.key_scales = allocate() if dtype == torch.int8 else []
        """One (S, K, L) float32 tensor per layer where keys are int8, else empty."""
        self.value_scales = allocate() if dtype == torch.int8 else []

    @property
    def sequences(self) -> int:
        """Number of sequences in use."""
        return len(self.lengths)

    def add(self, count: int) -> range:
        """Start ``count`` sequences behind those in use; return their numbers."""
        first, last = self.sequences, self.sequences + count
        assert last <= self.max_sequences, f"{last} sequences, room for {self.max_sequences}"
        self.lengths += [0] * count
        return range(first, last)

    def remove(self, sequence: int) -> None:
        """End a sequence; the last one takes its number."""
        last, length = self.sequences - 1, self.lengths[-1]
        if sequence != last:
            for part in (*self.keys, *self.values, *self.key_scales, *self.value_scales):
                part[sequence, :, :length] = part[last, :, :length]
            self.lengths[sequence] = length
        self.lengths.pop()

    def update(
        self,
        index: tuple[Tensor, Tensor],
        sequences: slice | Tensor,
        end: int,
        layer: int,
        keys: Tensor,
        values: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values (R, T, K, E) of a layer; return all (R, K, end, E) up to ``end``.

        They are stored at ``index``: the sequences (R, 1) and positions (R, T) int64. ``sequences``
        are the same ones, a slice where they are neighbours.
        """
        written, read = (index[0], slice(None), index[1]), (sequences, slice(None), slice(end))

        def part(stored: list[Tensor], scales: list[Tensor], new: Tensor) -> Tensor:
            if not scales:
                stored[layer][written] = new
                return stored[layer][read]
            floats = new.float()
            largest = floats.abs().amax(-1).clamp(min=_SMALLEST_SCALE)
            integers = (floats * (_INT8_MAX / largest).unsqueeze(-1)).round().to(torch.int8)
            stored[layer][written] = integers
            scales[layer][written] = largest * (1.0 / _INT8_MAX)
            return (stored[layer][read] * scales[layer][read].unsqueeze(-1)).to(new.dtype)

        return part(self.keys, self.key_scales, keys), part(self.values, self.value_scales, values)

    @staticmethod
    def bytes_per_sequence(config: TransformerConfig, positions: int, dtype: torch.dtype) -> int:
        """Return the memory that one sequence takes."""
        scale = torch.float32.itemsize if dtype == torch.int8 else 0
        per_head = config.head_dim * dtype.itemsize + scale
        return 2 * config.layers * config.num_kv_heads * positions * per_head
