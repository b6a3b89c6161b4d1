"""The autoregressive model over image codes."""

from llamagen.models.transformer.conditioning import ClassCondition, TextCondition
from llamagen.models.transformer.kv_cache import KVCache
from llamagen.models.transformer.model import Transformer
from llamagen.models.transformer.rope import apply_rope, rope_table
from llamagen.models.transformer.tokens import NO_CELL, Tokens

__all__ = [
    "NO_CELL",
    "ClassCondition",
    "KVCache",
    "TextCondition",
    "Tokens",
    "Transformer",
    "apply_rope",
    "rope_table",
]
