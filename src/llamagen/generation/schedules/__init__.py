"""Schedules: what each forward pass of an image feeds, and which codes it samples.

A schedule is one file here, and its choice in ``new_schedule``. The batch asks the schedule of each
image for its next pass, so images with different schedules and progress share a batch.
"""

from __future__ import annotations

from llamagen.config import Grid, Order
from llamagen.generation.request import UNKNOWN, GenerationRequest, uniform_draws
from llamagen.generation.schedules.base import Pass, Schedule
from llamagen.generation.schedules.jacobi import JacobiSchedule
from llamagen.generation.schedules.parallel import (
    ParallelSchedule,
    default_steps,
    group_sizes,
    local_order,
    random_order,
    sizes_after,
)
from llamagen.generation.schedules.raster import RasterSchedule

__all__ = ["MAX_TOKENS", "Pass", "Schedule", "codes_per_pass", "new_schedule"]

MAX_TOKENS = 32
"""Tokens of a pass up to which its time, with AMX, grows much more slowly than their number."""
ORDER_STREAM = 2
"""Stream of an image's random numbers that decides its order; see ``uniform_draws``."""


def new_schedule(
    request: GenerationRequest, model: Order, grid: Grid, *, is_wide: bool, sequences: int
) -> Schedule:
    """Return the schedule of an image, which starts, for a model of the order ``model``.

    ``is_wide`` as in ``backends.Step``; ``sequences`` of the whole batch, the image's included.
    """
    total, codes = grid[0] * grid[1], request.known_codes
    known = [False] * total if codes is None else (codes != UNKNOWN).flatten().tolist()
    if model == "random":
        sampling = request.sampling
        sizes = sizes_after(sum(known), total, sampling.steps or default_steps(total))
        priority = uniform_draws([request.seed], total, stream=ORDER_STREAM)[0].numpy()
        is_local = sampling.generation_order == "local"
        order = (
            local_order(grid, known, sizes, priority) if is_local else random_order(known, priority)
        )
        return ParallelSchedule(order, sizes)
    # Found faster for few images on CPUs with AMX, where sixteen rows of a pass cost what one
    # costs; slower on CPUs without (docs/speed.md). What is known is fed at once as it is.
    few = codes is None and is_wide and 4 * sequences <= MAX_TOKENS
    if few if request.window is None else request.window > 1:
        return JacobiSchedule(total, request.window)
    return RasterSchedule(total, known)


def codes_per_pass(request: GenerationRequest, model: Order, total: int) -> int:
    """Return the largest number of codes that a pass of an image samples."""
    if model == "random":
        return max(group_sizes(total, request.sampling.steps or default_steps(total)))
    return request.window or 1
