"""Drawing codes for rows that each have settings of their own.

What ``guide`` and ``next_codes`` do for a batch with one ``SamplingConfig``, for batches that
requests join and leave: row for row the same codes. ``RowSettings`` is made when the batch
changes, on the host; the functions then run at every step without waiting for the device.

Shapes: B rows, V codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llamagen.config import SamplingConfig
from llamagen.generation.filters import draw_codes, guide, next_codes


def guide_rows(conditional: Tensor, unconditional: Tensor, scales: Tensor) -> Tensor:
    """Guidance on logits (B, V) with one scale per row.

    Args:
        conditional: (B, V).
        unconditional: (B, V).
        scales: (B,) float32 on the same device. Rows of scale 1 are the conditional logits
            themselves, not what rounding makes of them.
    """
    scales = scales.unsqueeze(-1)
    # A tensor in the place of the number: the formula is the same.
    mixed = guide(conditional, unconditional, scales)  # type: ignore[arg-type]
    return torch.where(scales == 1.0, conditional, mixed)


@dataclass(frozen=True)
class _Chosen:
    """The rows to which a filter applies, and its setting for each of them."""

    rows: Tensor | None
    """(N,) int64; None means all rows."""
    values: Tensor
    """(N, 1)."""
    largest: float
    """The largest of the values, known on the host."""


@dataclass(frozen=True)
class RowSettings:
    """Temperature, top-k and top-p of each row of a batch."""

    count: int
    """Number of rows."""
    shared: SamplingConfig | None
    """The settings that all rows draw with, if they are the same."""
    greedy: Tensor | None
    """(B,) bool, True where the largest logit is taken; None if there is no such row."""
    temperature: Tensor | None
    """(B, 1) float32, what logits are divided by; None if it is 1 everywhere."""
    top_k: _Chosen | None
    top_p: _Chosen | None

    @classmethod
    def of(cls, rows: Sequence[SamplingConfig], device: torch.device | str = "cpu") -> RowSettings:
        """The settings of some rows, in their order, ready to be used on ``device``.

        Guidance is no part of them: see ``guide_rows``.
        """
        drawn = [_without_guidance(row) for row in rows]
        if all(row == drawn[0] for row in drawn):
            return cls(len(drawn), drawn[0] if drawn else None, None, None, None, None)
        greedy = [row.temperature == 0.0 for row in drawn]
        divisors = [row.temperature or 1.0 for row in drawn]
        return cls(
            count=len(drawn),
            shared=None,
            greedy=torch.tensor(greedy, device=device) if any(greedy) else None,
            temperature=(
                torch.tensor(divisors, device=device).unsqueeze(-1)
                if any(divisor != 1.0 for divisor in divisors)
                else None
            ),
            top_k=_chosen([row.top_k for row in drawn], [row.top_k > 0 for row in drawn], device),
            top_p=_chosen([row.top_p for row in drawn], [row.top_p < 1 for row in drawn], device),
        )


def next_codes_of_rows(logits: Tensor, settings: RowSettings, uniforms: Tensor) -> Tensor:
    """Draws one code per row, each with the row's own settings.

    On a CPU the codes are exactly those of ``next_codes`` for each row alone. A GPU divides by a
    number and by a tensor with different rounding, so there they are so up to floating-point ties.

    Args:
        logits: (B, V) float32, guided where guidance is wanted.
        settings: of the same rows.
        uniforms: (B,) in [0, 1), one per row and code.

    Returns:
        (B,) int64 codes.
    """
    assert logits.shape[0] == settings.count, (
        f"{logits.shape[0]} rows of logits, settings of {settings.count}"
    )
    if settings.shared is not None:
        return next_codes(logits, settings.shared, uniforms)
    filtered = logits if settings.temperature is None else logits / settings.temperature
    if settings.top_k is not None:
        filtered = _keep_top_k(filtered, settings.top_k)
    if settings.top_p is not None:
        filtered = _keep_top_p(filtered, settings.top_p)
    drawn = draw_codes(filtered, uniforms)
    if settings.greedy is None:
        return drawn
    return torch.where(settings.greedy, logits.argmax(-1), drawn)


def _without_guidance(row: SamplingConfig) -> SamplingConfig:
    """What decides how a row is drawn once it is guided: equal for rows that draw alike."""
    if row.temperature == 0.0:
        return SamplingConfig(guidance_scale=1.0, temperature=0.0)
    return SamplingConfig(
        guidance_scale=1.0, temperature=row.temperature, top_k=row.top_k, top_p=row.top_p
    )


def _chosen(
    values: Sequence[float], wanted: Sequence[bool], device: torch.device | str
) -> _Chosen | None:
    rows = [index for index, applies in enumerate(wanted) if applies]
    if not rows:
        return None
    own = [values[index] for index in rows]
    every = len(rows) == len(values)
    return _Chosen(
        rows=None if every else torch.tensor(rows, device=device),
        values=torch.tensor(own, device=device).unsqueeze(-1),
        largest=max(own),
    )


def _keep_top_k(logits: Tensor, chosen: _Chosen) -> Tensor:
    """``keep_top_k`` of the chosen rows, with one k per row."""
    own = logits if chosen.rows is None else logits[chosen.rows]
    codes = own.shape[-1]
    # The k largest are the first k of the larger selection: one selection serves all rows.
    largest = own.topk(min(int(chosen.largest), codes), dim=-1).values
    smallest_kept = largest.gather(-1, chosen.values.clamp(max=codes) - 1)
    return _put_back(logits, chosen, own.masked_fill(own < smallest_kept, -torch.inf))


def _keep_top_p(logits: Tensor, chosen: _Chosen) -> Tensor:
    """``keep_top_p`` of the chosen rows, with one p per row."""
    own = logits if chosen.rows is None else logits[chosen.rows]
    ordered, order = own.sort(dim=-1, descending=True)
    reached = ordered.softmax(-1).cumsum(-1)
    drop = (reached > chosen.values).roll(1, dims=-1)
    drop[..., 0] = False
    return _put_back(logits, chosen, own.masked_fill(drop.scatter(-1, order, drop), -torch.inf))


def _put_back(logits: Tensor, chosen: _Chosen, own: Tensor) -> Tensor:
    return own if chosen.rows is None else logits.index_copy(0, chosen.rows, own)
