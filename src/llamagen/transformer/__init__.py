"""The autoregressive model over image codes."""

from llamagen.transformer.cache import KVCache
from llamagen.transformer.condition import ClassCondition, TextCondition
from llamagen.transformer.decoder import Decoder, StepTimes, decoder_for
from llamagen.transformer.model import Transformer
from llamagen.transformer.rope import apply_rope, rope_table
from llamagen.transformer.slots import SlotCache

__all__ = [
    "ClassCondition",
    "Decoder",
    "KVCache",
    "SlotCache",
    "StepTimes",
    "TextCondition",
    "Transformer",
    "apply_rope",
    "decoder_for",
    "rope_table",
]
