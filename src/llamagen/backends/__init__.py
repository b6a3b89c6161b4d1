"""Faster ways to compute what the models compute.

A backend names every field of a configuration that it implements, and steps aside where any other
field is not at its default: the reference, the model's own operations, then computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

from llamagen.backends.compiled import CompiledStep as CompiledStep
from llamagen.backends.cpu.step import CpuStep as CpuStep
from llamagen.backends.cpu.step import StepTimes as StepTimes
from llamagen.config import Grid
from llamagen.models.transformer import KVCache, Tokens, Transformer

_reference_only: ContextVar[bool] = ContextVar("reference_only", default=False)


class Step(Protocol):
    """Computes ``Transformer.step`` of one model, as long as its weights stay where they are."""

    is_wide: bool
    """Whether sixteen tokens take about the time of one."""

    def __call__(self, tokens: Tokens, cache: KVCache, grid: Grid) -> Tensor:
        """Return logits (M, V), valid until the next call; see ``Transformer.step``."""


class ReferenceStep:
    """Computes with the model's own operations, on any device and for any configuration."""

    is_wide = False

    def __init__(self, model: Transformer, *, exact: bool = False) -> None:
        """``exact``: a sequence's logits depend on nothing else in a step, on a CPU."""
        self._model = model
        # In 16 bits, products of matrices on a CPU depend on the number of rows.
        self._is_split = exact and model.device.type == "cpu" and model.dtype != torch.float32

    def __call__(self, tokens: Tokens, cache: KVCache, grid: Grid) -> Tensor:
        """See ``Step``."""
        parts = tokens.by_sequence() if self._is_split else [tokens]
        return torch.cat([self._model.step(part, cache, grid=grid) for part in parts])


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
    return ReferenceStep(model, exact=not use_reference())
