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
    from llamagen.generation import generate_codes
    from llamagen.models.tokenizer import ImageTokenizer
    from llamagen.models.transformer import KVCache, Transformer
    from llamagen.pipeline import Pipeline, PipelineOutput
    from llamagen.pipeline.editing import Editor
    from llamagen.support.errors import InputError
    from llamagen.support.labels import Labels

# Name -> the module that defines it. Importing torch takes seconds; a program that only wants a
# configuration, or --help, should not wait for it.
_HOMES = {
    "Editor": "llamagen.pipeline.editing",
    "ImageTokenizer": "llamagen.models.tokenizer",
    "InputError": "llamagen.support.errors",
    "KVCache": "llamagen.models.transformer",
    "Labels": "llamagen.support.labels",
    "Pipeline": "llamagen.pipeline",
    "PipelineOutput": "llamagen.pipeline",
    "SamplingConfig": "llamagen.config",
    "TOKENIZER_PRESETS": "llamagen.config",
    "TRANSFORMER_PRESETS": "llamagen.config",
    "TokenizerConfig": "llamagen.config",
    "Transformer": "llamagen.models.transformer",
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
