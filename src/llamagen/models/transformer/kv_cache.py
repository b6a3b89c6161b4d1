"""The key-value cache: a value that whoever generates owns, never part of the model.

Shapes: S sequences there is room for, K key-value heads, L positions, E head dimension; of a step
R sequences and T tokens fed to each.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llamagen.config import TransformerConfig

_INT8_MAX = 127.0
_SMALLEST_SCALE = 1e-30
"""Largest magnitude assumed of keys and values that are all zero."""


@dataclass
class KVCache:
    """Keys and values of sequences, each with a length of its own; the first ones are in use.

    A batch whose sequences start together is the case where all lengths are equal. Positions behind
    a sequence's length may be written before they count: a step that looks ahead stores keys and
    values there, and ``lengths`` moves only over those that are final.

    In int8 each key and each value is integers times a scale of its own: half of bfloat16's memory.
    """

    keys: list[Tensor]
    """One (S, K, L, E) tensor per layer."""
    values: list[Tensor]
    """Likewise."""
    key_scales: list[Tensor] = field(default_factory=list)
    """One (S, K, L) float32 tensor per layer where keys are int8, else empty."""
    value_scales: list[Tensor] = field(default_factory=list)
    """Likewise."""
    lengths: list[int] = field(default_factory=list)
    """Positions filled of each sequence in use."""

    @classmethod
    def empty(
        cls,
        config: TransformerConfig,
        sequences: int,
        positions: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype,
    ) -> KVCache:
        """Return a cache for ``sequences`` of ``positions``; ``dtype`` is the model's, or int8."""
        shape = (sequences, config.num_kv_heads, positions)

        def allocate(*shape: int, dtype: torch.dtype = dtype) -> list[Tensor]:
            # Zeros: what attention masks out must still be finite.
            return [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]

        cache = cls(allocate(*shape, config.head_dim), allocate(*shape, config.head_dim))
        if dtype == torch.int8:
            cache.key_scales = allocate(*shape, dtype=torch.float32)
            cache.value_scales = allocate(*shape, dtype=torch.float32)
        return cache

    @property
    def sequences(self) -> int:
        """Number of sequences in use."""
        return len(self.lengths)

    @property
    def max_sequences(self) -> int:
        """S, sequences there is room for."""
        return self.keys[0].shape[0]

    @property
    def positions(self) -> int:
        """L, positions there is room for in each sequence."""
        return self.keys[0].shape[2]

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

        They are stored at ``index``: the sequences (R, 1) and positions (R, T) int64, and read from
        the same ``sequences``, which are a slice where they are neighbours.
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
