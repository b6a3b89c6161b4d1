"""Training of both models: recipes in, model folders out. Names are loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llamagen.training.config import (
        LoopConfig,
        TokenizerTraining,
        TransformerTraining,
    )
    from llamagen.training.loop import TrainingInterrupted, TrainingResult
    from llamagen.training.recipes import load_recipe
    from llamagen.training.tokenizer_task import train_tokenizer
    from llamagen.training.transformer_task import train_transformer

# As in ``llamagen``: a command that only describes its options need not wait for torch.
_HOMES = {
    "LoopConfig": "llamagen.training.config",
    "TokenizerTraining": "llamagen.training.config",
    "TrainingInterrupted": "llamagen.training.loop",
    "TrainingResult": "llamagen.training.loop",
    "TransformerTraining": "llamagen.training.config",
    "load_recipe": "llamagen.training.recipes",
    "train_tokenizer": "llamagen.training.tokenizer_task",
    "train_transformer": "llamagen.training.transformer_task",
}

__all__ = [
    "LoopConfig",
    "TokenizerTraining",
    "TrainingInterrupted",
    "TrainingResult",
    "TransformerTraining",
    "load_recipe",
    "train_tokenizer",
    "train_transformer",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'llamagen.training' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
