"""The interface of schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Pass(NamedTuple):
    """One forward pass of an image. Cells are numbered in raster order."""

    feed: Sequence[int]
    """Cells whose tokens are fed, behind what the cache holds and, in the first pass, behind the
    condition."""
    sample: Sequence[int]
    """Cells whose codes are sampled."""
    predicted_by: Sequence[int]
    """For each cell that is sampled, the fed token whose logits predict it: an index into ``feed``,
    or in the first pass -1 for the last token of the condition."""
    codes: Sequence[int] | None = None
    """The codes that are fed, where they are guesses; by default those of the cells."""
    queries: Sequence[int] = ()
    """The fed tokens that are queries and no codes: indices into ``feed``."""
    drawn: int | None = None
    """Codes drawn before those sampled, which guidance may depend on; by default those of the cells
    before each."""


class Schedule(Protocol):
    """The progress of one image."""

    needs_codes: bool
    """Whether ``accept`` reads the codes, which makes the host wait for the device."""

    @property
    def order(self) -> Sequence[int]:
        """All cells in the order in which their codes become final."""

    final: int
    """Number of codes that are final."""

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
