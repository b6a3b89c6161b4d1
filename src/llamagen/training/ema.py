"""A running mean of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """A second model whose weights follow the first one's slowly (Polyak averaging)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._weights: tuple[list[Tensor], list[Tensor]] = (
            list(self.model.parameters()),
            list(model.parameters()),
        )
        self._buffers = (list(self.model.buffers()), list(model.buffers()))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the mean towards the model as it is after ``step`` steps.

        Early on the decay is smaller, so that the random first weights are soon forgotten.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        mean, now = self._weights
        torch._foreach_lerp_(mean, now, 1.0 - decay)
        for kept, current in zip(*self._buffers, strict=True):
            kept.copy_(current)
