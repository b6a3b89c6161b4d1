"""Autoregressive image generation: the public names, loaded when first used."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llamagen.config import (
        TOKENIZER_PRESETS,
        TRANSFORMER_PRESETS,
        SamplingConfig,
        TokenizerConfig,
        TransformerConfig,
    )
    from llamagen.generation import generate_codes
    from llamagen.models.tokenizer import ImageTokenizer
    from llamagen.models.transformer import KVCache, Transformer
    from llamagen.pipeline import Pipeline, PipelineOutput
    from llamagen.pipeline.editing import Editor
    from llamagen.support.errors import InputError
    from llamagen.support.labels import Labels

__all__ = [
    "TOKENIZER_PRESETS",
    "TRANSFORMER_PRESETS",
    "Editor",
    "ImageTokenizer",
    "InputError",
    "KVCache",
    "Labels",
    "Pipeline",
    "PipelineOutput",
    "SamplingConfig",
    "TokenizerConfig",
    "Transformer",
    "TransformerConfig",
    "generate_codes",
]

# In the order in which they are searched. Importing torch takes seconds; a program that only wants
# a configuration, or --help, should not wait for it.
_MODULES = (
    *("config", "support.errors", "support.labels", "models.tokenizer", "models.transformer"),
    *("generation", "pipeline", "pipeline.editing"),
)


def __getattr__(name: str) -> object:
    if name in __all__:
        for module in _MODULES:
            found = getattr(importlib.import_module(f"llamagen.{module}"), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module 'llamagen' has no attribute {name!r}")


# The first edition's name of a module; it is imported when something of it is asked for.
sys.modules["llamagen.pictures"] = pictures = ModuleType("llamagen.pictures")
vars(pictures)["__getattr__"] = lambda name: getattr(
    importlib.import_module("llamagen.support.pictures"), name
)


def __dir__() -> list[str]:
    return sorted(__all__)
