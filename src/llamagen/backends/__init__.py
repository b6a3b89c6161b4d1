"""Faster ways to compute what the models compute.

A backend names every field of a configuration that it implements, and steps aside where any other
field is not at its default: the reference, the model's own operations, then computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from llamagen.backends.compiled import CompiledStep as CompiledStep
from llamagen.backends.cpu.step import CpuStep as CpuStep
from llamagen.backends.step import ReferenceStep as ReferenceStep
from llamagen.backends.step import Step as Step
from llamagen.backends.step import StepTimes as StepTimes
from llamagen.models.transformer import Transformer

_reference_only: ContextVar[bool] = ContextVar("reference_only", default=False)


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Generations that start in this block use the models' own operations, for comparisons."""
    token = _reference_only.set(True)
    try:
        yield
    finally:
        _reference_only.reset(token)


def use_reference() -> bool:
    """Whether backends must step aside; see ``reference_only``."""
    return _reference_only.get()


def fastest_step(model: Transformer, times: StepTimes | None = None) -> Step:
    """The fastest backend for a model in eval mode, as long as its weights stay where they are.

    Where the time goes is added to ``times``, by backends that measure it.
    """
    if not use_reference():
        if CpuStep.supports(model):
            return CpuStep(model, times)
        if CompiledStep.supports(model):
            return CompiledStep.of(model)
    return ReferenceStep(model)
