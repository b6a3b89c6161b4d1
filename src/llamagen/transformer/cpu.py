"""Two operations of training that torch is slow at on a CPU, done another way there.

Shapes: B batch, H heads, T positions, E head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_CHUNK_SCORES = 1 << 23
"""Scores computed at a time: 16 MB in bfloat16."""
_LONGEST = 768
"""Positions up to which plain products beat torch's fused attention; measured on Zen 5."""


class Dropout(nn.Dropout):
    """Dropout whose random numbers cost a sixth on a CPU.

    torch draws one random number after another there, each of 64 bits. Four decisions are made
    with one here; a probability is rounded to a multiple of 1/65536.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        elsewhere = x.device.type != "cpu" or torch.compiler.is_compiling()
        if elsewhere or not self.training or self.p in (0.0, 1.0):
            return super().forward(x)
        count = x.numel()
        numbers = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        smallest = round(self.p * 65536) - 32768
        kept = numbers.view(torch.int16)[:count].view(x.shape) >= smallest
        return x * kept.to(x.dtype).mul_(1.0 / (1.0 - self.p))


def plain_attention_pays(q: Tensor, k: Tensor) -> bool:
    """Whether ``causal_attention`` is the faster one for these queries and keys (B, H, T, E)."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and q.shape == k.shape
        and q.shape[2] <= _LONGEST
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of each position to itself and those before it: all (B, H, T, E).

    Plain products over a few heads at a time, and again in the backward pass, so that no more
    than one chunk of scores is ever in memory. Scores are rounded to the input's precision, as
    unfused attention under autocast does.
    """
    out: Tensor = _CausalAttention.apply(q, k, v)
    return out


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        queries, keys, values = (_rows(x) for x in (q, k, v))
        out = torch.empty_like(queries)
        for part in _chunks(queries):
            torch.bmm(_weights(queries[part], keys[part]), values[part], out=out[part])
        return out.view(q.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = grad.shape
        scale = shape[-1] ** -0.5
        q, k, v, grad = (_rows(x) for x in (*ctx.saved_tensors, grad))
        grads = [torch.empty_like(x) for x in (q, k, v)]
        for part in _chunks(q):
            weights = _weights(q[part], k[part])
            torch.bmm(weights.mT, grad[part], out=grads[2][part])
            slopes = torch.bmm(grad[part], v[part].mT)
            slopes = torch._softmax_backward_data(slopes, weights, -1, weights.dtype)
            for into, left, right in ((0, slopes, k[part]), (1, slopes.mT, q[part])):
                own = grads[into][part]
                torch.baddbmm(own, left, right, beta=0, alpha=scale, out=own)
        q_grad, k_grad, v_grad = (x.view(shape) for x in grads)
        return q_grad, k_grad, v_grad


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """Softmax over the positions up to each one's own: (rows, T, T)."""
    length, width = q.shape[-2:]
    later = q.new_full((length, length), float("-inf")).triu_(1)
    return torch.baddbmm(later, q, k.mT, alpha=width**-0.5).softmax(-1)


def _rows(x: Tensor) -> Tensor:
    """(B, H, T, E) to (B * H, T, E)."""
    return x.reshape(-1, *x.shape[2:])


def _chunks(x: Tensor) -> list[slice]:
    size = max(1, _CHUNK_SCORES // x.shape[1] ** 2)
    return [slice(start, start + size) for start in range(0, len(x), size)]
