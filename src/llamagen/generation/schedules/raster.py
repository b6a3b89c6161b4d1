"""One code per pass, in raster order (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

from llamagen.generation.schedules.base import Pass

_MAX_KNOWN = 64
"""Known codes fed in one pass."""


class RasterSchedule:
    """Samples the codes one after another; known ones are fed several at a time."""

    needs_codes = False

    def __init__(self, total: int, known: Sequence[bool] | None = None) -> None:
        """Start an image of ``total`` codes, of which those ``known`` are not sampled."""
        unknown = [cell for cell in range(total) if known is None or not known[cell]]
        self._unknown = iter([*unknown, total])
        self._total = total
        self.order = range(total)
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
        sampled = ((end,), (len(feed) - 1,)) if self._is_sampling else ((), ())
        return Pass(feed, *sampled)

    def accept(self, codes: Sequence[int]) -> int:
        """See ``Schedule``."""
        del codes
        accepted, self._fed = self._end - self._fed, self._end
        if self._is_sampling:
            self.final = next(self._unknown)
        return accepted
