"""A running mean of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from llamagen.training.parallel import local


class Ema:
    """Weights that follow a model's slowly (Polyak averaging); as sharded as the model's are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = {
            name: weight for name, weight in model.named_parameters() if weight.requires_grad
        }
        self._means = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the mean towards the model as it is after ``step`` steps.

        Early on the decay is smaller, so that the random first weights are soon forgotten.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._local(self._means), self._local(self._weights), 1.0 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the model has the mean weights; what is trained waits beside."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for weight, mean in zip(self._local(self._weights), self._local(self._means), strict=True):
            held = weight.clone()
            weight.copy_(mean)
            mean.copy_(held)

    def state_dict(self) -> dict[str, Tensor]:
        """The mean weights by their names."""
        return dict(self._means)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what ``state_dict`` returned."""
        for name, mean in self._means.items():
            local(mean).copy_(local(state[name]))

    def _local(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [local(tensor) for tensor in tensors.values()]
