"""From logits to a drawn code, as a ladder of pure functions.

The order is guidance, temperature, top-k, top-p, draw (paper section 3.3). No function edits its
input. Shapes: B images, V codes; leading dimensions are free where it says (..., V).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llamagen.config import SamplingConfig


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on logits (..., V): uncond + scale * (cond - uncond)."""
    return unconditional + scale * (conditional - unconditional)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Sets all but the ``k`` largest logits (..., V), and ties with the k-th, to -inf."""
    if k >= logits.shape[-1]:
        return logits
    # Unsorted takes half the time on a CPU.
    smallest_kept = logits.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Sets logits (..., V) to -inf behind the first code at which the probabilities exceed ``p``.

    Codes count from the most likely down; the one that crosses ``p`` is kept, so at least one is.
    """
    ordered, order = logits.sort(dim=-1, descending=True)
    reached = ordered.softmax(-1).cumsum(-1)
    drop = (reached > p).roll(1, dims=-1)
    drop[..., 0] = False
    return logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


def filter_logits(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Temperature, top-k and top-p over logits (..., V); what cannot be drawn becomes -inf.

    A temperature of 0 is left to ``draw_codes``, which then takes the largest logit.
    """
    if sampling.temperature not in (0.0, 1.0):
        logits = logits / sampling.temperature
    if sampling.top_k > 0:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1.0:
        logits = keep_top_p(logits, sampling.top_p)
    return logits


def draw_codes(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draws from softmax(logits) by inverting its cumulative distribution.

    One number per image decides its code, so neither other images in the batch nor the device's
    random generator have any say in it.

    Args:
        logits: (B, V) float32, -inf where a code cannot be drawn.
        uniforms: (B,) in [0, 1).

    Returns:
        (B,) int64 codes.
    """
    return draw_weighted(logits.softmax(-1), uniforms)


def draw_weighted(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draws codes with probabilities in proportion to weights; see ``draw_codes``.

    Args:
        weights: (B, V) float32 of at least 0, some of each row above it.
        uniforms: (B,) in [0, 1).

    Returns:
        (B,) int64 codes.
    """
    # In float32 the sum over 16384 codes would shift the later codes' probabilities. MPS has no
    # float64.
    dtype = torch.float32 if weights.device.type == "mps" else torch.float64
    cumulative = weights.cumsum(-1, dtype=dtype)
    total = cumulative[..., -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniforms.to(dtype).unsqueeze(-1) * total, below_total)
    # The first code whose cumulative probability exceeds the target: never one of probability 0.
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # NaN logits, which the decode loop reports at its end, must not index past the codebook.
    return drawn.clamp_(max=weights.shape[-1] - 1)


def next_codes(logits: Tensor, sampling: SamplingConfig, uniforms: Tensor) -> Tensor:
    """Draws one code per image from guided logits (B, V), given uniforms (B,)."""
    if sampling.temperature == 0.0:
        return logits.argmax(-1)
    return draw_codes(filter_logits(logits, sampling), uniforms)


def code_probabilities(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """What ``next_codes`` draws with: probabilities (..., V), from guided logits (..., V)."""
    if sampling.temperature == 0.0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return filter_logits(logits, sampling).softmax(-1)
