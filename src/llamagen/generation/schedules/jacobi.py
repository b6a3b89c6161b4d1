"""Several codes per forward pass, and the same codes as one by one.

Jacobi decoding (2410.01699) with fixed random numbers. An image has a window of drafts, guesses at
the codes that come next. One forward pass over the window gives the distribution of each position,
and each position samples from it with the very number that raster order samples it with. Up to and
including the first code that changed, distributions were computed from the codes that stand there
now: these codes are final. Those behind it stay as drafts for the next pass (2603.18599 goes on
behind the first change too).

Why that changes nothing: given an image's random numbers, each of its codes is a function of the
codes before it, and a code becomes final when that function has been computed from final codes. So
codes are those sampled one by one, up to floating-point ties, and distributed exactly like them.
Drafts hold, though distributions change with what stands before, because a number that samples a
code from one distribution mostly samples it from a similar one too.
"""

from __future__ import annotations

from collections.abc import Sequence

from llamagen.generation.schedules.base import Pass

_WINDOW_PER_CODE = 4.0
"""Positions of a window for each code that a pass has lately made final."""
_TRIALS = 12
"""Passes after which it is known whether drafts hold."""
_MIN_CODES_PER_PASS = 1.25
"""Codes per pass that a window has to make final to be worth its time."""


class JacobiSchedule:
    """Predicts a window of codes in each pass; as many become final as hold."""

    needs_codes = True

    def __init__(self, total: int, window: int | None = None) -> None:
        """Start an image of ``total`` codes, ``window`` of which a pass predicts.

        By default the window grows where drafts hold and ends where they do not.
        """
        self._total = total
        self._window = window
        self.order = range(total)
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
        return Pass((), (0,), (-1,))

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
