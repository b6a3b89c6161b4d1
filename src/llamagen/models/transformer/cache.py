"""The key-value cache: a value that whoever generates owns, never part of the model.

Shapes: B batch, K key-value heads, L positions, E head dimension, C condition length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llamagen.config import Grid, TransformerConfig

_LARGEST = 127.0
# Of keys and values that are all zero.
_LEAST = 1e-30


@dataclass
class KVCache:
    """Keys and values of every position seen so far, for a batch of sequences.

    Memory for all positions of ``grid`` is taken at once; ``length`` of them are filled. Attention
    reads the filled part only. In int8 each key and each value is whole numbers times a scale of
    its own: half the memory of bfloat16.
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
    key_scales: list[Tensor] = field(default_factory=list)
    """One (B, K, L) float32 tensor per layer where keys are int8, else empty."""
    value_scales: list[Tensor] = field(default_factory=list)
    """Likewise."""

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
        """A cache with room for ``condition_length`` positions and all codes of ``grid``.

        ``dtype`` is the model's, or int8.
        """
        room = condition_length + grid[0] * grid[1]
        shape = (batch, config.num_kv_heads, room, config.head_dim)

        def allocate() -> list[Tensor]:
            return [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.layers)]

        return cls(
            keys=allocate(),
            values=allocate(),
            grid=grid,
            condition_length=condition_length,
            key_scales=scales_for(config, shape, device, dtype),
            value_scales=scales_for(config, shape, device, dtype),
        )

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.keys[0].shape[0]

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self.keys[0].shape[2]

    @property
    def parts(self) -> list[Tensor]:
        """All that is kept, (B, K, L, ...)."""
        return self.keys + self.values + self.key_scales + self.value_scales

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values (B, K, T, E) behind the filled part of ``layer``.

        Returns the layer's keys and values of all positions so far, (B, K, length + T, E).
        ``length`` moves only with ``advance``, once all layers have written.
        """
        end = self.length + keys.shape[2]
        assert end <= self.capacity, f"{end} positions in a cache with room for {self.capacity}"
        new = (slice(None), slice(None), slice(self.length, end))
        filled = (slice(None), slice(None), slice(end))
        return (
            write(self.keys, self.key_scales, layer, new, keys, read=filled),
            write(self.values, self.value_scales, layer, new, values, read=filled),
        )

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
            key_scales=[scales[:rows] for scales in self.key_scales],
            value_scales=[scales[:rows] for scales in self.value_scales],
        )

    @staticmethod
    def bytes_per_sequence(
        config: TransformerConfig, *, grid: Grid, condition_length: int, dtype: torch.dtype
    ) -> int:
        """Memory that one sequence takes."""
        room = condition_length + grid[0] * grid[1]
        per_head = config.head_dim * dtype.itemsize
        if dtype == torch.int8:
            per_head += torch.float32.itemsize
        return 2 * config.layers * config.num_kv_heads * room * per_head


def scales_for(
    config: TransformerConfig, shape: Sequence[int], device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Room for what numbers of ``shape`` (..., E) are to be multiplied by: (...) for each layer.

    Empty unless ``dtype`` is int8.
    """
    if dtype != torch.int8:
        return []
    return [torch.zeros(*shape[:-1], device=device) for _ in range(config.layers)]


def write(
    kept: list[Tensor],
    scales: list[Tensor],
    layer: int,
    index: tuple[Tensor | slice, ...],
    new: Tensor,
    *,
    read: tuple[Tensor | slice, ...],
) -> Tensor:
    """Writes ``new`` (..., E) to ``index`` of what a layer keeps; returns what stands at ``read``.

    That is in the precision of ``new``. ``scales`` is empty where floats are kept.
    """
    own = kept[layer]
    if not scales:
        own[index] = new
        return own[read]
    floats = new.float()
    most = floats.abs().amax(-1).clamp(min=_LEAST)
    own[index] = (floats * (_LARGEST / most).unsqueeze(-1)).round().to(torch.int8)
    scales[layer][index] = most * (1.0 / _LARGEST)
    return (own[read] * scales[layer][read].unsqueeze(-1)).type_as(new)
