"""How much of a codebook is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class CodebookUsage:
    """Share of the codes that occurred among about the last ``window`` codes seen."""

    def __init__(self, codebook_size: int, *, window: int) -> None:
        self.window = window
        self._seen = 0
        # One number per code instead of the window itself: when the code last occurred.
        self._last = torch.full((codebook_size,), -window - 1, dtype=torch.int64)

    def add(self, codes: Tensor) -> None:
        """Counts a batch of codes, of any shape."""
        self._last = self._last.to(codes.device)
        self._seen += codes.numel()
        self._last[codes.flatten()] = self._seen

    def share(self) -> float:
        """From 0 to 1."""
        return float((self._last > self._seen - self.window).float().mean())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"seen": self._seen, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what ``state_dict`` returned."""
        self._seen, self._last = state["seen"], state["last"]
