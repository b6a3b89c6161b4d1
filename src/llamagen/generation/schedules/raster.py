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
        """Start an image.

        Args:
            total: codes of the image.
            known: for each of them whether it is known; by default none is.
        """
        self._unknown = [cell for cell in range(total) if known is None or not known[cell]]
        self._total = total
        self._fed = 0
        self._next = 0
        """Index into ``_unknown``."""

    @property
    def final(self) -> int:
        """See ``Schedule``."""
        return self._unknown[self._next] if self._next < len(self._unknown) else self._total

    def first_pass(self) -> Pass:
        """See ``Schedule``."""
        return Pass((), *self._sampled(0, 0))

    def next_pass(self, max_tokens: int) -> Pass:
        """See ``Schedule``."""
        del max_tokens
        end = min(self.final, self._fed + _MAX_KNOWN)
        feed = range(self._fed, end)
        return Pass(feed, *self._sampled(end, len(feed) - 1))

    def _sampled(self, fed: int, row: int) -> tuple[Sequence[int], Sequence[int]]:
        """The code behind the first ``fed`` ones, if it is to be sampled."""
        is_unknown = self.final == fed < self._total
        self._sampling = is_unknown
        self._end = fed
        return ((fed,), (row,)) if is_unknown else ((), ())

    def accept(self, codes: Sequence[int]) -> int:
        """See ``Schedule``."""
        del codes
        fed = self._end - self._fed
        self._fed = self._end
        self._next += self._sampling
        return fed
