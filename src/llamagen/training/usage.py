"""How much of a codebook is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llamagen.support import distributed


class CodebookUsage:
    """Share of the codes that occurred among about the last ``window`` codes seen.

    All processes together: each counts its own, and they compare when asked.
    """

    def __init__(self, codebook_size: int, *, window: int) -> None:
        self.window = window
        self._seen = 0
        # One number per code instead of the window itself: when the code last occurred.
        self._last = torch.full((codebook_size,), -window - 1, dtype=torch.int64)

    def add(self, codes: Tensor) -> None:
        """Counts a batch of codes, of any shape."""
        self._last = self._last.to(codes.device)
        # As many in every process.
        self._seen += codes.numel() * distributed.world_size()
        self._last[codes.flatten()] = self._seen

    def share(self) -> float:
        """From 0 to 1."""
        return float(self._used().float().mean())

    def unused(self) -> Tensor:
        """Indices of the codes that did not occur; none before a whole window has been seen."""
        if self._seen < self.window:
            return self._last.new_empty(0)
        return (~self._used()).nonzero().flatten()

    def mark_used(self, codes: Tensor) -> None:
        """Gives codes (N,) a whole window from now on to occur in."""
        self._last[codes.to(self._last.device)] = self._seen

    def _used(self) -> Tensor:
        return distributed.maximum(self._last) > self._seen - self.window

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, from all processes."""
        return {"seen": self._seen, "last": distributed.maximum(self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what ``state_dict`` returned."""
        self._seen, self._last = state["seen"], state["last"]
