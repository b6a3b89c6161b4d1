"""The key-value cache: a value that whoever generates owns, never part of the model.

Shapes: B batch, K key-value heads, L positions, E head dimension, C condition length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llamagen.config import Grid, TransformerConfig


@dataclass
class KVCache:
    """Keys and values of every position seen so far, for a batch of sequences.

    Memory for all positions of ``grid`` is taken at once; ``length`` of them are filled. Attention
    reads the filled part only.
    """

    keys: list[Tensor]
    """One (B, K, L, E) tensor per layer."""
    values: list[Tensor]
    """One (B, K, L, E) tensor per layer."""
    grid: Grid
    """The grid whose positions the sequences walk through."""
    condition_length: int
    """Positions of the condition, in front of the codes."""
    length: int = 0
    """Positions filled."""
    condition_mask: Tensor | None = None
    """(B, C) bool, False where the condition is padding; None if nothing is."""

    @classmethod
    def empty(
        cls,
        config: TransformerConfig,
        batch: int,
        *,
        grid: Grid,
        condition_length: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> KVCache:
        """A cache with room for ``condition_length`` positions and all codes of ``grid``."""
        room = condition_length + grid[0] * grid[1]
        shape = (batch, config.num_kv_heads, room, config.head_dim)

        def allocate() -> list[Tensor]:
            return [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.layers)]

        return cls(keys=allocate(), values=allocate(), grid=grid, condition_length=condition_length)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.keys[0].shape[0]

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self.keys[0].shape[2]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values (B, K, T, E) behind the filled part of ``layer``.

        Returns the layer's keys and values of all positions so far, (B, K, length + T, E).
        ``length`` moves only with ``advance``, once all layers have written.
        """
        end = self.length + keys.shape[2]
        assert end <= self.capacity, f"{end} positions in a cache with room for {self.capacity}"
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, positions: int) -> None:
        """Counts ``positions`` more as filled."""
        self.length += positions

    def rewind(self, length: int) -> None:
        """Forgets everything behind the first ``length`` positions."""
        assert 0 <= length <= self.length, f"cannot rewind from {self.length} to {length}"
        self.length = length

    def first_rows(self, rows: int) -> KVCache:
        """A cache over the first ``rows`` sequences that shares this one's memory."""
        return KVCache(
            keys=[k[:rows] for k in self.keys],
            values=[v[:rows] for v in self.values],
            grid=self.grid,
            condition_length=self.condition_length,
            length=self.length,
            condition_mask=None if self.condition_mask is None else self.condition_mask[:rows],
        )

    @staticmethod
    def bytes_per_sequence(
        config: TransformerConfig, *, grid: Grid, condition_length: int, dtype: torch.dtype
    ) -> int:
        """Memory that one sequence takes."""
        room = condition_length + grid[0] * grid[1]
        return 2 * config.layers * config.num_kv_heads * room * config.head_dim * dtype.itemsize
