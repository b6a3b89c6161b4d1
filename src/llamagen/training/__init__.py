"""Training of both models: recipes in, model folders out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from llamagen.training.config import LoopConfig as LoopConfig
from llamagen.training.config import TokenizerTraining as TokenizerTraining
from llamagen.training.config import TransformerTraining as TransformerTraining
from llamagen.training.recipes import load_recipe as load_recipe

if TYPE_CHECKING:
    from llamagen.training.loop import TrainingInterrupted as TrainingInterrupted
    from llamagen.training.loop import TrainingResult as TrainingResult
    from llamagen.training.tokenizer_task import train_tokenizer as train_tokenizer
    from llamagen.training.transformer_task import train_transformer as train_transformer

# Loaded when first used: a command that only describes its options need not wait for torch.
_HOMES = {
    "TrainingInterrupted": "loop",
    "TrainingResult": "loop",
    "train_tokenizer": "tokenizer_task",
    "train_transformer": "transformer_task",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'llamagen.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"llamagen.training.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
