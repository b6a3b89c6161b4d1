"""The autoregressive model over image codes."""

from llamagen.models.transformer.cache import KVCache
from llamagen.models.transformer.condition import ClassCondition, TextCondition
from llamagen.models.transformer.model import Transformer
from llamagen.models.transformer.rope import apply_rope, rope_table
from llamagen.models.transformer.slots import SlotCache

__all__ = [
    "ClassCondition",
    "KVCache",
    "SlotCache",
    "TextCondition",
    "Transformer",
    "apply_rope",
    "rope_table",
]
