"""Codes from a transformer: guidance, filters, the decode loop."""

from llamagen.generation.decode import RowCallback, generate_codes
from llamagen.generation.filters import (
    draw_codes,
    filter_logits,
    guide,
    keep_top_k,
    keep_top_p,
    next_codes,
)
from llamagen.generation.seeds import uniform_draws

__all__ = [
    "RowCallback",
    "draw_codes",
    "filter_logits",
    "generate_codes",
    "guide",
    "keep_top_k",
    "keep_top_p",
    "next_codes",
    "uniform_draws",
]
