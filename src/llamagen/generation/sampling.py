"""From logits to codes: one ladder of pure functions on per-row tensors, the reference.

The order is guidance, temperature, top-k, top-p, min-p, draw (paper section 3.3). No function
edits its input. Backends may compute the same faster, never differently. A new filter is one
function here, its line in ``Filters``, and its row in ``config.SamplingConfig``.

Shapes: D rows, one per code that is sampled, each with settings of its own; V codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamagen.backends import use_reference
from llamagen.backends.cpu.sampling import CpuSampler, Rows
from llamagen.config import SamplingConfig
from llamagen.models.transformer import to_index

GREEDY_TEMPERATURE = 1e-6
"""Temperatures below it take the most likely code: logits divided by less would overflow."""

Value = float | Tensor
"""A setting: one number for all rows, or (D, 1) with one for each."""


def guidance_scale_at(sampling: SamplingConfig, index: int, total: int) -> float:
    """Return the guidance scale of code ``index`` (counted in the order of sampling) of ``total``.

    1 means that the conditional logits are used as they are. Linear as in RandAR (2412.01827),
    power-cosine as in RAR (2411.00776).
    """
    if sampling.guidance_stop is not None and index >= sampling.guidance_stop:
        return 1.0
    progress, scale = index / total, sampling.guidance_scale
    match sampling.guidance_schedule:
        case "linear":
            return sampling.guidance_start + (scale - sampling.guidance_start) * progress
        case "power-cosine":
            share = (1.0 - math.cos(math.pi * progress**sampling.guidance_power)) / 2.0
            return 1.0 + (scale - 1.0) * share
        case _:
            return scale


def apply_guidance(conditional: Tensor, unconditional: Tensor, scale: Value) -> Tensor:
    """Apply classifier-free guidance to logits (D, V): uncond + scale * (cond - uncond)."""
    return unconditional + scale * (conditional - unconditional)


def apply_top_k(logits: Tensor, k: int | Tensor) -> Tensor:
    """Set all but the ``k`` largest logits, and ties with the k-th, to -inf; k 0 keeps all."""
    size = logits.shape[-1]
    if not isinstance(k, Tensor):
        if not 0 < k < size:
            return logits
        # Unsorted takes half the time on a CPU.
        threshold = logits.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        return logits.masked_fill(logits < threshold, -torch.inf)
    k = k.clamp(max=size)
    # The k largest are the first k of the largest selection: one selection serves all rows.
    largest = logits.topk(max(1, int(k.max())), dim=-1).values
    threshold = largest.gather(-1, (k - 1).clamp(min=0)).masked_fill(k == 0, -torch.inf)
    return logits.masked_fill(logits < threshold, -torch.inf)


def apply_top_p(logits: Tensor, p: Value) -> Tensor:
    """Set logits to -inf behind the first code at which the probabilities exceed ``p``.

    Codes count from the most likely down; the one that crosses ``p`` is kept, so at least one is.
    """
    ordered, order = logits.sort(dim=-1, descending=True)
    reached = ordered.softmax(-1).cumsum(-1)
    drop = (reached > p).roll(1, dims=-1)
    drop[..., 0] = False
    return logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


def apply_min_p(logits: Tensor, p: Value) -> Tensor:
    """Set logits to -inf whose probability is less than ``p`` times the largest; p 0 keeps all."""
    minimum = torch.as_tensor(p, dtype=logits.dtype, device=logits.device).log()
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + minimum, -torch.inf)


def sample_from(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Sample codes (D,) int64 from softmax(logits) by inverting its cumulative distribution.

    ``logits`` (D, V) are float32, -inf where a code cannot be sampled. One of the ``uniforms`` (D,)
    in [0, 1) decides each row's code, so neither other rows nor the device's random generator have
    any influence.
    """
    weights = logits.softmax(-1)
    # In float32 the sum over 16384 codes would shift the later codes' probabilities. MPS has no
    # float64.
    dtype = torch.float32 if weights.device.type == "mps" else torch.float64
    cumulative = weights.cumsum(-1, dtype=dtype)
    total = cumulative[..., -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniforms.to(dtype).unsqueeze(-1) * total, below_total)
    # The first code whose cumulative probability exceeds the target: never one of probability 0.
    codes = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # NaN logits, which are reported at the end, must not index past the codebook.
    return codes.clamp_(max=weights.shape[-1] - 1)


@dataclass(frozen=True)
class Filters:
    """Filters of guided logits, for rows with settings of their own."""

    greedy: Tensor | None
    """(D,) bool, True where the largest logit is taken; None if there is no such row."""
    temperature: Value
    top_k: int | Tensor
    top_p: Value
    min_p: Value

    @classmethod
    def of(cls, rows: Sequence[SamplingConfig], device: torch.device | str = "cpu") -> Filters:
        """Return the filters of some rows, in their order, to be used on ``device``."""
        greedy = [row.temperature < GREEDY_TEMPERATURE for row in rows]
        temperatures = [max(row.temperature, GREEDY_TEMPERATURE) for row in rows]
        return cls(
            greedy=torch.tensor(greedy, device=device) if any(greedy) else None,
            temperature=_column(temperatures, device),
            top_k=_column([row.top_k for row in rows], device),
            # Rounding may let all probabilities together exceed 1.
            top_p=_column([row.top_p if row.top_p < 1.0 else 2.0 for row in rows], device),
            min_p=_column([row.min_p for row in rows], device),
        )

    def __call__(self, logits: Tensor) -> Tensor:
        """Filter guided logits (D, V); what cannot be sampled becomes -inf."""
        if isinstance(self.temperature, Tensor) or self.temperature != 1.0:
            logits = logits / self.temperature
        logits = apply_top_k(logits, self.top_k)
        if isinstance(self.top_p, Tensor) or self.top_p < 1.0:
            logits = apply_top_p(logits, self.top_p)
        if isinstance(self.min_p, Tensor) or self.min_p > 0.0:
            logits = apply_min_p(logits, self.min_p)
        return logits


def sample_codes(logits: Tensor, filters: Filters, uniforms: Tensor) -> Tensor:
    """Sample codes (D,) from guided logits (D, V) float32, with ``uniforms`` (D,) in [0, 1)."""
    if filters.greedy is None:
        return sample_from(filters(logits), uniforms)
    best = logits.argmax(-1)
    if bool(filters.greedy.all()):
        return best
    return torch.where(filters.greedy, best, sample_from(filters(logits), uniforms))


class ReferenceSampler:
    """Samples as ``CpuSampler``, with torch's operations on any device, without waiting for it."""

    def __init__(self, settings: Sequence[SamplingConfig], device: torch.device) -> None:
        self._filters = Filters.of(settings, device)
        self._device = device

    def __call__(
        self, conditional: Tensor, unconditional: Tensor, rows: Rows, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``CpuSampler``."""
        logits = conditional[to_index(rows.conditional, self._device)].float()
        guided = np.flatnonzero((rows.unconditional >= 0) & (rows.scales != 1.0))
        if len(guided) > 0:
            others = to_index(rows.unconditional[guided], self._device)
            scales = torch.from_numpy(rows.scales[guided]).to(self._device, non_blocking=True)
            own = slice(None) if len(guided) == len(logits) else to_index(guided, self._device)
            logits[own] = apply_guidance(
                logits[own], unconditional[others].float(), scales.unsqueeze(-1)
            )
        return sample_codes(logits, self._filters, uniforms), logits.isfinite().all(-1)


def _column(values: Sequence[Any], device: torch.device | str) -> Any:
    """One number if all rows share it, else (D, 1)."""
    if all(value == values[0] for value in values):
        return values[0]
    # Not torch's default type, which others may have changed.
    dtype = torch.int64 if isinstance(values[0], int) else torch.float32
    return torch.tensor(values, dtype=dtype, device=device).unsqueeze(-1)


Sampler = ReferenceSampler | CpuSampler
"""Samples codes of rows whose filters do not change from call to call."""


def fastest_sampler(
    settings: Sequence[SamplingConfig], codebook_size: int, device: torch.device
) -> Sampler:
    """Return the fastest sampler for rows with these settings, whose logits are on ``device``."""
    if CpuSampler.supports(settings, codebook_size, device) and not use_reference():
        return CpuSampler(settings)
    return ReferenceSampler(settings, device)
