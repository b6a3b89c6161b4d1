"""The interface of schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


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
        ...

    def next_pass(self, max_tokens: int) -> Pass:
        """Return the next pass, of an image that is not finished.

        Up to ``max_tokens`` tokens of this image, a pass costs little more time.
        """
        ...

    def accept(self, codes: Sequence[int]) -> int:
        """Take the codes that the pass sampled; return how many of the fed tokens are final.

        ``codes`` is empty unless ``needs_codes``. Tokens that are not final are fed again.
        """
        ...
