"""The side of a training run that differs between the two models."""

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
    """Losses of a batch."""

    total: Tensor
    """Scalar, to be minimised by the model."""
    metrics: dict[str, Tensor]
    """Scalars to be logged, without gradients."""
    adversary: Tensor | None = None
    """Scalar, to be minimised by the adversary, without gradients of the model."""


class Task(abc.ABC):
    """A model, its data, its loss and its validation."""

    name: ClassVar[str]
    panels: Mapping[str, Sequence[str]]
    """Panels of the curves: title -> metrics."""
    model: nn.Module
    """The model that is trained and saved."""
    module: nn.Module
    """The module that a step calls, and DDP or FSDP wraps: the model or a larger one."""
    adversary: nn.Module | None = None
    """A discriminator with an optimiser of its own; always in training mode."""
    adversary_lr: float = 0.0
    """The adversary's full learning rate; both follow one schedule."""
    data: Mapping[str, str]
    """Identity of everything that the run reads, by name."""
    note: str | None = None
    """A line to show when a run begins."""
    about: Mapping[str, Any]
    """The model's kind and configuration, as plain values for the checkpoint."""
    blocks: Sequence[nn.Module] = ()
    """Parts of the model that are compiled, or sharded, one by one."""
    units_per_image: Mapping[str, float] = {}
    """Units of throughput besides images: name -> number per image."""
    flops_per_image: float | None = None
    """Floating-point operations of a step for one image, if they are known."""

    def prepare(self) -> None:  # noqa: B027
        """Initialise the weights of a new run, once the model is on its device.

        All processes call it; without sharding, the main process's weights are broadcast later.
        """

    def whole_model(self, state: Mapping[str, Tensor]) -> nn.Module:
        """Return an unsharded module like ``self.module`` whose model has this state."""
        raise NotImplementedError(f"{self.name} models are not sharded")

    @abc.abstractmethod
    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """Yield the batches of the steps from ``first`` up to but not including ``last``."""

    @abc.abstractmethod
    def losses(
        self, model: nn.Module, batch: Batch, *, step: int, adversary: nn.Module | None
    ) -> Losses:
        """Return the losses of this process's rows of a batch, or of a part of them.

        Both modules are the task's, perhaps wrapped by torch; ``step`` counts the finished steps.
        """

    def after_step(self, step: int) -> None:  # noqa: B027
        """Take further actions after step ``step``; all processes call it."""

    def statistics(self) -> dict[str, float]:
        """Return further metrics of the recent batches together."""
        return {}

    @abc.abstractmethod
    def validate(self) -> dict[str, float]:
        """Return metrics on held-out images, the same in every process; empty without any."""

    @abc.abstractmethod
    def draw_samples(self, model: nn.Module, path: Path) -> None:
        """Write a sheet of samples; only the main process calls it."""

    @abc.abstractmethod
    def export(self, model: nn.Module, out: Path) -> Path:
        """Write the model's folder into the run's and return it; only the main process calls it."""

    @abc.abstractmethod
    def skipped(self) -> int:
        """Return the number of files that could not be read so far."""

    def state_dict(self) -> dict[str, Any]:
        """Return state besides model and optimiser for a checkpoint, from all processes."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Continue from what ``state_dict`` returned."""
