"""Schedules: what each forward pass of an image feeds, and which codes it samples.

A schedule is one file here, and its choice in ``new_schedule``. The batch asks the schedule of each
image for its next pass, so images with different schedules and progress share a batch.
"""

from __future__ import annotations

from llamagen.generation.request import UNKNOWN, GenerationRequest
from llamagen.generation.schedules.base import Pass, Schedule
from llamagen.generation.schedules.jacobi import JacobiSchedule
from llamagen.generation.schedules.raster import RasterSchedule

__all__ = ["MAX_TOKENS", "Pass", "Schedule", "new_schedule"]

MAX_TOKENS = 32
"""Tokens of a pass up to which its time, with AMX, grows much more slowly than their number."""


def new_schedule(
    request: GenerationRequest, total: int, *, is_wide: bool, sequences: int
) -> Schedule:
    """Return the schedule of an image of ``total`` codes, which starts.

    ``is_wide`` as in ``backends.Step``; ``sequences`` of the whole batch, the image's included.
    """
    known = request.known_codes
    # Found faster for few images on CPUs with AMX, where sixteen rows of a pass cost what one
    # costs; slower on CPUs without (docs/speed.md). What is known is fed at once as it is.
    few = known is None and is_wide and 4 * sequences <= MAX_TOKENS
    if few if request.window is None else request.window > 1:
        return JacobiSchedule(total, request.window)
    return RasterSchedule(total, None if known is None else (known != UNKNOWN).flatten().tolist())
