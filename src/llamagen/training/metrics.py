"""Numbers measured in training: means between two log lines, codebook usage, FLOPs."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llamagen.config import TransformerConfig
from llamagen.support import distributed

_PEAK_BFLOAT16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""FLOP/s without sparsity, from NVIDIA's data sheets. The first name in a device's counts."""


class Meter:
    """Means of scalars. Sums stay on their device, so adding does not synchronise."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: collections.Counter[str] = collections.Counter()

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one scalar per name."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts.update(values.keys())

    def means(self) -> dict[str, float]:
        """Return the mean of each name's values since ``clear``, over all processes."""
        return {name: total / self._counts[name] for name, total in self._totals().items()}

    def clear(self) -> None:
        """Reset all means."""
        self._sums.clear()
        self._counts.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, for a checkpoint between two log lines."""
        return {"sums": self._totals(), "counts": dict(self._counts)}

    def _totals(self) -> dict[str, float]:
        """Return the sums, averaged over the processes, which have all added the same names."""
        if not self._sums:
            return {}
        sums = torch.stack([total.double().cpu() for total in self._sums.values()])
        return dict(zip(self._sums, distributed.mean(sums).tolist(), strict=True))

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from what ``state_dict`` returned."""
        self._sums = {k: torch.tensor(v, device=device) for k, v in state["sums"].items()}
        self._counts = collections.Counter(state["counts"])


class CodebookUsage:
    """Fraction of the codes that occurred among about the last ``window`` codes, over processes."""

    def __init__(self, codebook_size: int, *, window: int) -> None:
        self.window = window
        self._seen = 0
        # When each code last occurred: one number per code instead of the window itself.
        self._last = torch.full((codebook_size,), -window - 1, dtype=torch.int64)

    def add(self, codes: Tensor) -> None:
        """Count a batch of codes, of any shape, as many in every process."""
        self._last = self._last.to(codes.device)
        self._seen += codes.numel() * distributed.world_size()
        self._last[codes.flatten()] = self._seen

    def share(self) -> float:
        """Return the fraction, from 0 to 1."""
        return float(self._used().float().mean())

    def unused(self) -> Tensor:
        """Return the codes that did not occur; none before a whole window has been seen."""
        if self._seen < self.window:
            return self._last.new_empty(0)
        return (~self._used()).nonzero().flatten()

    def mark_used(self, codes: Tensor) -> None:
        """Count codes (N,) as if they occurred now."""
        self._last[codes.to(self._last.device)] = self._seen

    def _used(self) -> Tensor:
        return distributed.maximum(self._last) > self._seen - self.window

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all processes."""
        return {"seen": self._seen, "last": distributed.maximum(self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned."""
        self._seen, self._last = state["seen"], state["last"]


def training_flops(config: TransformerConfig) -> float:
    """Return the floating-point operations of one training step for one image.

    Six for each weight of a matrix product and each position (two forward, four backward), and
    the attention's own products over all pairs of positions, causal or not: what the model needs
    (Chowdhery et al. 2204.02311, appendix B), without what is recomputed to save memory.
    """
    positions = config.condition_length + config.tokens_per_code * config.num_codes - 1
    width = config.head_dim * (config.heads + 2 * config.num_kv_heads)
    block = config.dim * width + config.dim * config.dim + 3 * config.dim * config.ffn_dim
    weights = config.layers * block + config.dim * config.codebook_size
    attention = 12.0 * config.layers * config.dim * positions**2
    return 6.0 * weights * positions + attention


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return a device's peak FLOP/s at a precision; None if that is not known."""
    if device.type != "cuda" or precision != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAK_BFLOAT16.items() if known in name), None)
