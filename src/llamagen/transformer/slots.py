"""A key-value cache whose sequences are at different places: what a server's batch needs.

Shapes: R sequences, K key-value heads, L positions, E head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llamagen.config import Grid, TransformerConfig
from llamagen.transformer.cache import KVCache


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
    _places: tuple[Tensor, Tensor] | None = None

    @classmethod
    def empty(
        cls,
        config: TransformerConfig,
        slots: int,
        *,
        grid: Grid,
        device: torch.device,
        dtype: torch.dtype,
    ) -> SlotCache:
        """A cache for up to ``slots`` sequences of the longest condition and all codes."""
        room = config.condition_length + grid[0] * grid[1]
        shape = (slots, config.num_kv_heads, room, config.head_dim)

        def allocate() -> list[Tensor]:
            # Zeros: what attention masks out must still be finite.
            return [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]

        return cls(keys=allocate(), values=allocate(), grid=grid)

    @property
    def batch(self) -> int:
        """R, the number of sequences."""
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        """Sequences there is room for."""
        return self.keys[0].shape[0]

    def admit(self, started: KVCache) -> None:
        """Adds the sequences of a cache that holds their conditions only, behind the others."""
        first, last = self.batch, self.batch + started.batch
        assert last <= self.capacity, f"{last} sequences in a cache with {self.capacity} slots"
        length = started.length
        for own, new in zip(self.keys + self.values, started.keys + started.values, strict=True):
            own[first:last, :, :length] = new[:, :, :length]
        self.conditions += [length] * started.batch
        self.lengths += [length] * started.batch
        self._places = None

    def remove(self, sequence: int) -> None:
        """Ends a sequence; the last one takes its slot."""
        last = self.batch - 1
        if sequence != last:
            length = self.lengths[last]
            for part in self.keys + self.values:
                part[sequence, :, :length] = part[last, :, :length]
            self.conditions[sequence] = self.conditions[last]
            self.lengths[sequence] = length
        self.conditions.pop()
        self.lengths.pop()
        self._places = None

    def clear(self) -> None:
        """Ends all sequences."""
        self.conditions, self.lengths, self._places = [], [], None

    def code_indices(self) -> Tensor:
        """(R,) int64: which code of its image each sequence is fed next."""
        pairs = zip(self.lengths, self.conditions, strict=True)
        return torch.tensor([length - condition for length, condition in pairs])

    def attended(self) -> Tensor | None:
        """(R, 1, 1, L) bool, True where the next position attends; None if that is everywhere."""
        longest = max(self.lengths)
        if min(self.lengths) == longest:
            return None
        _, places = self._next_places()
        return (torch.arange(longest + 1, device=places.device) <= places[:, None])[:, None, None]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values (R, K, 1, E) behind each sequence's own.

        Returns the layer's keys and values (R, K, L, E) up to the longest sequence.
        ``lengths`` move only with ``advance``, once all layers have written.
        """
        count, end = self.batch, max(self.lengths) + 1
        sequences, places = self._next_places()
        self.keys[layer][sequences, :, places] = keys[:, :, 0]
        self.values[layer][sequences, :, places] = values[:, :, 0]
        return self.keys[layer][:count, :, :end], self.values[layer][:count, :, :end]

    def advance(self, positions: int) -> None:
        """Counts ``positions`` more of each sequence as filled."""
        self.lengths = [length + positions for length in self.lengths]
        self._places = None

    def _next_places(self) -> tuple[Tensor, Tensor]:
        """Sequences (R,) and where the next position of each goes (R,); the same in all layers."""
        if self._places is None:
            device = self.keys[0].device
            sequences = torch.arange(self.batch, device=device)
            self._places = sequences, torch.tensor(self.lengths, device=device)
        return self._places
