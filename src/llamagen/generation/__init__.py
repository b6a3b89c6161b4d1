"""Codes from a transformer: requests, sampling, schedules, the decode loop, engines."""

from llamagen.generation.engine import Engine, EngineError, NativeEngine, Progress
from llamagen.generation.generate import RowCallback, generate_codes
from llamagen.generation.request import UNKNOWN, GenerationRequest
from llamagen.generation.sampling import (
    apply_guidance,
    apply_top_k,
    apply_top_p,
    sample_codes,
    sample_from,
)
from llamagen.generation.seeds import uniform_draws

__all__ = [
    "UNKNOWN",
    "Engine",
    "EngineError",
    "GenerationRequest",
    "NativeEngine",
    "Progress",
    "RowCallback",
    "apply_guidance",
    "apply_top_k",
    "apply_top_p",
    "generate_codes",
    "sample_codes",
    "sample_from",
    "uniform_draws",
]
