"""A key-value cache whose sequences are at different places: what a server's batch needs.

Shapes: R sequences, T positions fed to each, K key-value heads, L positions, E head dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from llamagen.config import Grid, TransformerConfig
from llamagen.models.transformer.cache import KVCache, scales_for, write


class _Places(NamedTuple):
    """Where keys and values are written next."""

    sequences: Tensor
    """(R, 1): numbers of the sequences."""
    positions: Tensor
    """(R, T)."""
    end: int
    """The first position behind all of these."""
    everywhere: bool
    """Whether each of them attends to all that stands in front of ``end``."""


@dataclass
class SlotCache:
    """Keys and values of sequences that joined at different times; the first R slots are in use.

    Attention reads as far as the longest sequence goes.
    """

    keys: list[Tensor]
    """One (slots, K, L, E) tensor per layer."""
    values: list[Tensor]
    """One (slots, K, L, E) tensor per layer."""
    grid: Grid
    """The grid whose positions the sequences walk through."""
    conditions: list[int] = field(default_factory=list)
    """Per sequence, positions of its condition."""
    lengths: list[int] = field(default_factory=list)
    """Per sequence, positions filled."""
    key_scales: list[Tensor] = field(default_factory=list)
    """One (slots, K, L) float32 tensor per layer where keys are int8, else empty."""
    value_scales: list[Tensor] = field(default_factory=list)
    """Likewise."""
    _places: _Places | None = None
    """What ``_next_places`` has found last, until a length changes."""

    @classmethod
    def empty(
        cls,
        config: TransformerConfig,
        slots: int,
        *,
        grid: Grid,
        device: torch.device,
        dtype: torch.dtype,
        spare: int = 0,
    ) -> SlotCache:
        """A cache for up to ``slots`` sequences of the longest condition and all codes.

        ``spare`` more positions are for windows that reach past an image's last code.
        """
        room = config.condition_length + grid[0] * grid[1] + spare
        shape = (slots, config.num_kv_heads, room, config.head_dim)

        def allocate() -> list[Tensor]:
            # Zeros: what attention masks out must still be finite.
            return [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]

        return cls(
            keys=allocate(),
            values=allocate(),
            grid=grid,
            key_scales=scales_for(config, shape, device, dtype),
            value_scales=scales_for(config, shape, device, dtype),
        )

    @property
    def batch(self) -> int:
        """R, the number of sequences."""
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        """Sequences there is room for."""
        return self.keys[0].shape[0]

    @property
    def parts(self) -> list[Tensor]:
        """All that is kept, (slots, K, L, ...)."""
        return self.keys + self.values + self.key_scales + self.value_scales

    def admit(self, started: KVCache) -> None:
        """Adds the sequences of a cache that holds their conditions only, behind the others."""
        first, last = self.batch, self.batch + started.batch
        assert last <= self.capacity, f"{last} sequences in a cache with {self.capacity} slots"
        length = started.length
        for own, new in zip(self.parts, started.parts, strict=True):
            own[first:last, :, :length] = new[:, :, :length]
        self.conditions += [length] * started.batch
        self.lengths += [length] * started.batch
        self._places = None

    def remove(self, sequence: int) -> None:
        """Ends a sequence; the last one takes its slot."""
        last = self.batch - 1
        if sequence != last:
            length = self.lengths[last]
            for part in self.parts:
                part[sequence, :, :length] = part[last, :, :length]
            self.conditions[sequence] = self.conditions[last]
            self.lengths[sequence] = length
        self.conditions.pop()
        self.lengths.pop()
        self._places = None

    def clear(self) -> None:
        """Ends all sequences."""
        self.conditions, self.lengths, self._places = [], [], None

    def cells(self, positions: int = 1) -> Tensor:
        """(R, T) int64: which codes of their images the next positions of each sequence hold.

        Past an image's last code it is the last one, which has a place on the grid.
        """
        pairs = zip(self.lengths, self.conditions, strict=True)
        next_codes = torch.tensor([length - condition for length, condition in pairs])
        cells = next_codes.unsqueeze(1) + torch.arange(positions)
        return cells.clamp_(max=self.grid[0] * self.grid[1] - 1)

    def attended(self, positions: int = 1) -> Tensor | None:
        """(R, 1, T, L) bool, True where the next positions attend; None if that is everywhere."""
        places = self._next_places(positions)
        if places.everywhere:
            return None
        index = torch.arange(places.end, device=places.positions.device)
        return (index <= places.positions.unsqueeze(-1)).unsqueeze(1)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values (R, K, T, E) behind each sequence's own.

        Returns the layer's keys and values (R, K, L, E) up to the longest sequence.
        ``lengths`` move only with ``advance``, once all layers have written.
        """
        room = self.keys[layer].shape[2]
        sequences, places, end, _ = self._next_places(keys.shape[2])
        assert end <= room, f"{end} positions in slots with room for {room}"
        new = (sequences, slice(None), places)
        filled = (slice(self.batch), slice(None), slice(end))
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        return (
            write(self.keys, self.key_scales, layer, new, keys, read=filled),
            write(self.values, self.value_scales, layer, new, values, read=filled),
        )

    def advance(self, positions: int) -> None:
        """Counts ``positions`` more of each sequence as filled."""
        self.advance_each([positions] * self.batch)

    def advance_each(self, positions: Sequence[int]) -> None:
        """Counts as many more positions of each sequence (R) as filled as are given for it."""
        self.lengths = [old + new for old, new in zip(self.lengths, positions, strict=True)]
        self._places = None

    def at(self, cells: Sequence[int]) -> SlotCache:
        """These slots, over the same memory, where the next positions are those of ``cells`` (T,).

        Cells are codes of an image, numbered in raster order, each at most once.
        """
        return dataclasses.replace(self, _places=self._places_at(self.conditions, cells))

    def _next_places(self, positions: int) -> _Places:
        """Where the next positions of each sequence go; the same in all layers."""
        if self._places is None or self._places.positions.shape[1] != positions:
            self._places = self._places_at(self.lengths, range(positions))
        return self._places

    def _places_at(self, starts: Sequence[int], offsets: Sequence[int]) -> _Places:
        """Places that are ``offsets`` (T,) behind the start of each sequence (R,)."""
        device = self.keys[0].device
        first = torch.tensor(starts, device=device).unsqueeze(1)
        return _Places(
            torch.arange(self.batch, device=device).unsqueeze(1),
            first + torch.tensor(offsets, device=device),
            max(starts) + max(offsets) + 1,
            len(offsets) == 1 and min(starts) == max(starts),
        )
