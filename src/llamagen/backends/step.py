"""One inference step of a transformer, as every backend computes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from llamagen.config import Grid
from llamagen.models.transformer import KVCache, Tokens, Transformer


@dataclass
class StepTimes:
    """Where the time of generation goes, in seconds; counted by the CPU kernels only."""

    parts: np.ndarray = field(default_factory=lambda: np.zeros(3, dtype=np.float64))
    """(3,) float64: products with weights, attention, the rest of the steps."""
    sampling: float = 0.0
    """Sampling codes from logits."""


class Step(Protocol):
    """Computes ``Transformer.step`` of one model, as long as its weights stay where they are."""

    is_wide: bool
    """Whether sixteen tokens take about the time of one."""

    def __call__(self, tokens: Tokens, cache: KVCache, grid: Grid) -> Tensor:
        """Return logits (M, V), valid until the next call; see ``Transformer.step``."""
        ...


class ReferenceStep:
    """Computes with the model's own operations, on any device and for any configuration."""

    is_wide = False

    def __init__(self, model: Transformer) -> None:
        self._model = model

    def __call__(self, tokens: Tokens, cache: KVCache, grid: Grid) -> Tensor:
        """See ``Step``."""
        return self._model.step(tokens, cache, grid=grid)
