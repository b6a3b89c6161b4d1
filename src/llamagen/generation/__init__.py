"""Codes from a transformer: requests, sampling, schedules, the decode loop, engines."""

from llamagen.generation.engine import NativeEngine, Progress
from llamagen.generation.generate import generate_codes
from llamagen.generation.request import UNKNOWN, GenerationRequest
from llamagen.generation.sampling import apply_guidance, sample_codes
from llamagen.generation.seeds import uniform_draws

__all__ = [
    "UNKNOWN",
    "GenerationRequest",
    "NativeEngine",
    "Progress",
    "apply_guidance",
    "generate_codes",
    "sample_codes",
    "uniform_draws",
]
