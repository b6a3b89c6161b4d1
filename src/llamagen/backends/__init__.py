"""Faster ways to compute what the models compute.

A backend names every field of a configuration that it implements, and steps aside where any other
field is not at its default: the reference, the model's own operations, then computes.
"""

from __future__ import annotations

from llamagen.backends.cpu.step import CpuStep
from llamagen.backends.step import ReferenceStep, Step, StepTimes
from llamagen.models.transformer import Transformer

__all__ = ["ReferenceStep", "Step", "StepTimes", "fastest_step"]


def fastest_step(model: Transformer, times: StepTimes | None = None) -> Step:
    """The fastest backend for a model, to be used as long as its weights stay where they are.

    Args:
        model: in eval mode.
        times: where the time goes is added to it, by backends that measure it.
    """
    return CpuStep(model, times) if CpuStep.supports(model) else ReferenceStep(model)
