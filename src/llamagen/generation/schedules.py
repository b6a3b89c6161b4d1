"""Schedules: what each forward pass of an image feeds, and which codes it samples.

A schedule is one class here, and its choice in ``new_schedule``. The batch asks the schedule of
each image for its next pass, so images with different schedules and progress share a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from llamagen.generation.request import UNKNOWN, GenerationRequest

MAX_TOKENS = 32
"""Tokens of a pass up to which its time, with AMX, grows much more slowly than their number."""
_MAX_KNOWN = 64
"""Known codes fed in one pass."""
_WINDOW_PER_CODE = 4.0
"""Positions of a window for each code that a pass has lately made final."""
_TRIALS = 12
"""Passes after which it is known whether drafts hold."""
_MIN_CODES_PER_PASS = 1.25
"""Codes per pass that a window has to make final to be worth its time."""


class Pass(NamedTuple):
    """One forward pass of an image. Cells are numbered in raster order."""

    feed: Sequence[int]
    """Cells whose codes are fed, behind what the cache holds. None in the first pass, which reads
    the condition."""
    sample: Sequence[int]
    """Cells whose codes are sampled."""
    predicted_by: Sequence[int]
    """For each cell that is sampled, the fed token whose logits predict it: an index into ``feed``,
    or 0 in the first pass for the last token of the condition."""
    codes: Sequence[int] | None = None
    """The codes that are fed, where they are guesses; by default those of the cells."""


class Schedule(Protocol):
    """The progress of one image."""

    needs_codes: bool
    """Whether ``accept`` reads the codes, which makes the host wait for the device."""

    final: int
    """Number of codes that are final: those of the first cells in raster order."""

    def first_pass(self) -> Pass:
        """Return the pass that reads the condition."""

    def next_pass(self, max_tokens: int) -> Pass:
        """Return the next pass, of an image that is not finished.

        Up to ``max_tokens`` tokens of this image, a pass costs little more time.
        """

    def accept(self, codes: Sequence[int]) -> int:
        """Take the codes that the pass sampled; return how many of the fed tokens are final.

        ``codes`` is empty unless ``needs_codes``. Tokens that are not final are fed again.
        """


class RasterSchedule:
    """Samples codes one by one in raster order (paper section 3.2); feeds known ones together."""

    needs_codes = False

    def __init__(self, total: int, known: Sequence[bool] | None = None) -> None:
        """Start an image of ``total`` codes, of which those ``known`` are not sampled."""
        unknown = [cell for cell in range(total) if known is None or not known[cell]]
        self._unknown = iter([*unknown, total])
        self._total = total
        self.final = next(self._unknown)
        self._fed = 0

    def first_pass(self) -> Pass:
        """See ``Schedule``."""
        return self._pass(0)

    def next_pass(self, max_tokens: int) -> Pass:
        """See ``Schedule``."""
        del max_tokens
        return self._pass(min(self.final, self._fed + _MAX_KNOWN))

    def _pass(self, end: int) -> Pass:
        """Feed the codes before ``end``; sample the one there, unless it is known."""
        feed = range(self._fed, end)
        self._end, self._is_sampling = end, end == self.final < self._total
        sampled = ((end,), (max(0, len(feed) - 1),)) if self._is_sampling else ((), ())
        return Pass(feed, *sampled)

    def accept(self, codes: Sequence[int]) -> int:
        """See ``Schedule``."""
        del codes
        accepted, self._fed = self._end - self._fed, self._end
        if self._is_sampling:
            self.final = next(self._unknown)
        return accepted


class JacobiSchedule:
    """Predicts a window of codes in each pass; as many become final as hold.

    Jacobi decoding (2410.01699) with fixed random numbers. An image has a window of drafts, guesses
    at the codes that come next. One forward pass over the window gives the distribution of each
    position, and each position samples from it with the very number that raster order samples it
    with. Up to and including the first code that changed, distributions were computed from the
    codes that stand there now: these codes are final. Those behind it stay as drafts for the next
    pass (2603.18599 goes on behind the first change too).

    Why that changes nothing: given an image's random numbers, each of its codes is a function of
    the codes before it, and a code becomes final when that function has been computed from final
    codes. So codes are those sampled one by one, up to floating-point ties, and distributed exactly
    like them. Drafts hold, though distributions change with what stands before, because a number
    that samples a code from one distribution mostly samples it from a similar one too.
    """

    needs_codes = True

    def __init__(self, total: int, window: int | None = None) -> None:
        """Start an image of ``total`` codes, ``window`` of which a pass predicts.

        By default the window grows where drafts hold and ends where they do not.
        """
        self._total = total
        self._window = window
        self.final = 0
        self._drafts: list[int] = []
        """Guesses at the codes of the cells from ``final`` on."""
        self._last = 0
        """The last final code."""
        self._repeated = 0
        """The code that stands for drafts that are missing."""
        self._codes_per_pass = 2.0
        self._windows = 0

    def first_pass(self) -> Pass:
        """See ``Schedule``."""
        return Pass((), (0,), (0,))

    def next_pass(self, max_tokens: int) -> Pass:
        """See ``Schedule``."""
        start = self.final
        width = max(1, min(self._width(max_tokens), self._total - start))
        # Cleverer guesses, such as the code above in the grid, save no passes.
        self._drafts += [self._repeated] * (width - 1 - len(self._drafts))
        # What is fed stands before what is predicted.
        codes = [self._last, *self._drafts[: width - 1]]
        return Pass(
            range(start - 1, start - 1 + width), range(start, start + width), range(width), codes
        )

    def _width(self, max_tokens: int) -> int:
        if self._window is not None:
            return self._window
        if self._windows >= _TRIALS and self._codes_per_pass < _MIN_CODES_PER_PASS:
            return 1
        return min(max_tokens, round(_WINDOW_PER_CODE * self._codes_per_pass))

    def accept(self, codes: Sequence[int]) -> int:
        """See ``Schedule``."""
        held = 0
        while held < len(codes) - 1 and codes[held] == self._drafts[held]:
            held += 1
        final = held + 1
        if len(codes) > 1:
            self._windows += 1
            self._codes_per_pass += (final - self._codes_per_pass) / min(self._windows + 1, 8)
        is_first = self.final == 0
        # A guess may have led to logits that are not finite (-1): any code is as good.
        guesses = [max(code, 0) for code in codes]
        self._last, self._repeated = guesses[held], guesses[-1]
        self._drafts = guesses[final:]
        self.final += final
        return 0 if is_first else final


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
