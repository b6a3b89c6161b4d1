"""Autoregressive image generation: the public names, loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llamagen.config import (
        TOKENIZER_PRESETS,
        TRANSFORMER_PRESETS,
        SamplingConfig,
        TokenizerConfig,
        TransformerConfig,
    )
    from llamagen.editing import Editor
    from llamagen.errors import InputError
    from llamagen.generation import generate_codes
    from llamagen.labels import Labels
    from llamagen.pipeline import Pipeline, PipelineOutput
    from llamagen.tokenizer import ImageTokenizer
    from llamagen.transformer import KVCache, Transformer

# Name -> the module that defines it. Importing torch takes seconds; a program that only wants a
# configuration, or --help, should not wait for it.
_HOMES = {
    "Editor": "llamagen.editing",
    "ImageTokenizer": "llamagen.tokenizer",
    "InputError": "llamagen.errors",
    "KVCache": "llamagen.transformer",
    "Labels": "llamagen.labels",
    "Pipeline": "llamagen.pipeline",
    "PipelineOutput": "llamagen.pipeline",
    "SamplingConfig": "llamagen.config",
    "TOKENIZER_PRESETS": "llamagen.config",
    "TRANSFORMER_PRESETS": "llamagen.config",
    "TokenizerConfig": "llamagen.config",
    "Transformer": "llamagen.transformer",
    "TransformerConfig": "llamagen.config",
    "generate_codes": "llamagen.generation",
}

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


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'llamagen' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
