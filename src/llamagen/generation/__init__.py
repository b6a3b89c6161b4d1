"""Codes from a transformer: guidance, filters, the decode loop and faster ones."""

from llamagen.generation.decode import RowCallback, generate_codes
from llamagen.generation.filters import (
    draw_codes,
    filter_logits,
    guide,
    keep_top_k,
    keep_top_p,
    next_codes,
)
from llamagen.generation.row_parallel import RowParallelCodes, generate_codes_row_parallel
from llamagen.generation.seeds import uniform_draws
from llamagen.generation.speculative import (
    ParallelCodes,
    generate_codes_in_parallel,
    looking_ahead_pays,
)

__all__ = [
    "ParallelCodes",
    "RowCallback",
    "RowParallelCodes",
    "draw_codes",
    "filter_logits",
    "generate_codes",
    "generate_codes_in_parallel",
    "generate_codes_row_parallel",
    "guide",
    "keep_top_k",
    "keep_top_p",
    "looking_ahead_pays",
    "next_codes",
    "uniform_draws",
]
