"""Codes from a transformer: guidance, filters, the decode loop and a faster one."""

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
from llamagen.generation.speculative import (
    ParallelCodes,
    generate_codes_in_parallel,
    looking_ahead_pays,
)

__all__ = [
    "ParallelCodes",
    "RowCallback",
    "draw_codes",
    "filter_logits",
    "generate_codes",
    "generate_codes_in_parallel",
    "guide",
    "keep_top_k",
    "keep_top_p",
    "looking_ahead_pays",
    "next_codes",
    "uniform_draws",
]
