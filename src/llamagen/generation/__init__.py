"""Codes from a transformer: requests, sampling, schedules, the decode loop, engines."""

from llamagen.generation.engine import NativeEngine as NativeEngine
from llamagen.generation.engine import Progress as Progress
from llamagen.generation.generate import generate_codes as generate_codes
from llamagen.generation.request import UNKNOWN as UNKNOWN
from llamagen.generation.request import GenerationRequest as GenerationRequest
from llamagen.generation.request import uniform_draws as uniform_draws
from llamagen.generation.sampling import apply_guidance as apply_guidance
from llamagen.generation.sampling import sample_codes as sample_codes
