"""What is trained: the side of a training run that differs between the two models."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

Batch = dict[str, Tensor]
"""Named tensors with one row per image."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losses:
    """What a task computes of a batch."""

    total: Tensor
    """Scalar, to be minimised by the model."""
    metrics: dict[str, Tensor]
    """Scalars to be logged, without gradients."""
    adversary: Tensor | None = None
    """Scalar, to be minimised by the adversary; it leads back to nothing of the model."""


class Task(abc.ABC):
    """What is trained, on what, and how one sees how well."""

    name: ClassVar[str]
    panels: Mapping[str, Sequence[str]]
    """The curves: title -> metrics."""
    model: nn.Module
    """What is trained and saved."""
    module: nn.Module
    """What is called in a step, and wrapped or sharded for that: the model or a larger module."""
    adversary: nn.Module | None = None
    """Trained against the model, with an optimiser of its own; always in training mode."""
    adversary_lr: float = 0.0
    """The adversary's learning rate where the model's is the recipe's; both follow one schedule."""
    data: Mapping[str, str]
    """Identity of everything that the run reads, by name."""
    units_per_image: Mapping[str, float] = {}
    """What speed is measured in beside images: name -> how many an image has."""

    def prepare(self) -> None:  # noqa: B027
        """Called once before the first step of a new run, with the model on its device.

        In every process; where the model is whole in each, the main process's weights count.
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the model is, as plain values for the checkpoint: its kind, its configuration."""

    def blocks(self) -> list[nn.Module]:
        """Parts of the model that are compiled, or sharded, one by one."""
        return []

    def whole_model(self, state: Mapping[str, Tensor]) -> nn.Module:
        """A module like ``self.module`` whose model has this state, where that is sharded."""
        raise NotImplementedError(f"{self.name} models are not sharded")

    def flops_per_image(self) -> float | None:
        """Floating-point operations of a training step for one image, if they are known."""
        return None

    @abc.abstractmethod
    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """The batches of the steps from ``first`` up to but not including ``last``."""

    @abc.abstractmethod
    def losses(
        self, model: nn.Module, batch: Batch, *, step: int, adversary: nn.Module | None
    ) -> Losses:
        """Of one batch, or of a part of it.

        Args:
            model: ``self.module`` as it is to be called: perhaps in a wrapper of torch.
            batch: this process's rows, on its device.
            step: finished steps.
            adversary: ``self.adversary``, likewise.
        """

    def after_step(self, step: int) -> None:  # noqa: B027
        """Called in every process after the weights have moved in step ``step``."""

    def statistics(self) -> dict[str, float]:
        """Further numbers to log, of the recent batches together."""
        return {}

    @abc.abstractmethod
    def validate(self) -> dict[str, float]:
        """Metrics on held-out images, the same in every process; empty if there are none."""

    @abc.abstractmethod
    def draw_samples(self, model: nn.Module, path: Path) -> None:
        """Writes a picture that shows what the model can do; called in the main process only."""

    @abc.abstractmethod
    def export(self, model: nn.Module, out: Path) -> Path:
        """Writes the model's folder into the run's; returns it. In the main process only."""

    @abc.abstractmethod
    def skipped(self) -> int:
        """Files that could not be read so far."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside model and optimiser, collected from all processes."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Takes up what ``state_dict`` returned."""
