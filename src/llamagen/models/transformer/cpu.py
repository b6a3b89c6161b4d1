"""Operations of training that torch is slow at on a CPU, done another way there.

Each does what a module of ``blocks`` says in few passes over memory, most of them with a backward
pass of their own. ``pays`` says when.

Shapes: B batch, H heads, K key-value heads, T positions, E head dimension, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_CHUNK_SCORES = 1 << 21
"""Scores computed at a time: 4 MB in bfloat16, which caches hold; measured on Zen 4."""
_LONGEST = 768
"""Positions up to which plain products beat torch's fused attention; measured on Zen 5."""
_LONGEST_KEPT = 384
"""Positions up to which attention keeps its weights for the backward pass instead of computing them
again. With heads of 64 that is at most six times the memory of its output."""


def pays(x: Tensor) -> bool:
    """Whether the forms of this module are used for ``x``: on a CPU, where gradients are wanted."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


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
        scale = torch.tensor(1.0 / (1.0 - self.p), dtype=x.dtype)
        kept = numbers.view(torch.int16)[:count].view(x.shape)
        if x.dtype != torch.bfloat16 or smallest > 32767:
            return x * (kept >= smallest).to(x.dtype).mul_(scale)
        # The random numbers turn into 0 or the bits of the scale where they are: a third of the
        # time, because torch is slow at making anything of truth values.
        return x * kept.ge_(smallest).mul_(scale.view(torch.int16)).view(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of ``x`` (..., D) float32, times ``weight`` (D,).

    Rounded once, to the precision of autocast where it is on: what follows is a product.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    out: Tensor = _RMSNorm.apply(x, weight, eps, dtype)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        width = x.shape[-1]
        lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = lengths.square_().div_(width).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        out = torch.empty_like(x, dtype=dtype)
        return torch.mul(x * scale, weight, out=out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        shape, width = x.shape, x.shape[-1]
        x, grad, scale = (part.reshape(-1, part.shape[-1]) for part in (x, grad, scale))
        products = x * grad
        weight_grad = products.T @ scale.squeeze(-1)
        # The part of the gradient along x changes its length only, which the norm undoes.
        along = (products @ weight).unsqueeze(-1).mul_(scale**3).div_(width)
        x_grad = (grad * weight).mul_(scale).addcmul_(x, along, value=-1)
        return x_grad.view(shape), weight_grad, None, None


def turned_heads(
    projected: Tensor, rope: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, T, E), keys and values (B, K, T, E), the first two turned.

    Args:
        projected: (B, T, (H + 2K) E).
        rope: (T, E / 2, 2), as ``apply_rope`` takes it.
        heads: H.
        kv_heads: K.
    """
    q, k, v = _TurnedHeads.apply(projected, rope, heads, kv_heads)
    return q, k, v


class _TurnedHeads(torch.autograd.Function):
    """A pair that turns is a complex number times another one; backward, times its conjugate."""

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, rope: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rope)
        ctx.counts = [heads, kv_heads, kv_heads]
        parts = projected.unflatten(-1, (sum(ctx.counts), -1))  # (B, T, H + 2K, E)
        turned = _wide_empty(parts[:, :, : heads + kv_heads]).copy_(parts[:, :, : heads + kv_heads])
        _pairs(turned).mul_(torch.view_as_complex(rope).unsqueeze(1))
        q, k = turned.split(ctx.counts[:2], dim=2)
        v = parts[:, :, heads + kv_heads :]
        return tuple(_moved(part, projected.dtype) for part in (q, k, v))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (rope,) = ctx.saved_tensors
        q, k, v = (grad.transpose(1, 2) for grad in grads)
        batch, length, heads, width = q.shape
        out = q.new_empty(batch, length, sum(ctx.counts), width)
        last = heads + k.shape[2]
        turned = _wide_empty(out[:, :, :last])
        turned[:, :, :heads] = q
        turned[:, :, heads:] = k
        _pairs(turned).mul_(torch.view_as_complex(rope).conj().unsqueeze(1))
        out[:, :, :last] = turned
        out[:, :, last:] = v
        return out.flatten(2), None, None, None


def _wide_empty(x: Tensor) -> Tensor:
    """Of the shape of ``x`` and contiguous, in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _pairs(x: Tensor) -> Tensor:
    """The neighbouring numbers of the last dimension as complex ones, where they are."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _moved(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T, H, E) to (B, H, T, E) that is contiguous."""
    batch, length, heads, width = x.shape
    return x.new_empty(batch, heads, length, width, dtype=dtype).copy_(x.transpose(1, 2))


def plain_attention_pays(q: Tensor, k: Tensor) -> bool:
    """Whether ``causal_attention`` is the faster one for these queries and keys (B, H, T, E)."""
    return pays(q) and q.dtype == torch.bfloat16 and q.shape == k.shape and q.shape[2] <= _LONGEST


def causal_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
    """Attention of each position to itself and those before it: all (B, H, T, E).

    Plain products over a few heads at a time, so that their scores stay in caches. Beyond
    ``_LONGEST_KEPT`` positions they are computed again in the backward pass, and no more than one
    chunk of them is ever in memory. Scores are rounded to the input's precision, as unfused
    attention under autocast does.

    Args:
        q: queries.
        k: keys.
        v: values.
        valid: (B, T) bool; what is False is padding, which only itself attends to.
    """
    padding = None
    if valid is not None and not valid.all():
        # Up to the last column that has any.
        width = int((~valid).any(0).nonzero().max()) + 1
        padding = ~valid[:, :width].repeat_interleave(q.shape[1], 0).unsqueeze(1)
    out: Tensor = _CausalAttention.apply(q, k, v, padding)
    return out


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
        keep = q.shape[2] <= _LONGEST_KEPT
        kept = []
        queries, keys, values = (_rows(x) for x in (q, k, v))
        out = torch.empty_like(queries)
        later = _later(q)
        for part in _chunks(queries):
            weights = _weights(queries, keys, later, padding, part)
            torch.bmm(weights, values[part], out=out[part])
            if keep:
                kept.append(weights)
        ctx.save_for_backward(q, k, v, padding, *kept)
        return out.view(q.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        shape = grad.shape
        scale = shape[-1] ** -0.5
        q, k, v, padding, *kept = ctx.saved_tensors
        later = _later(q)
        q, k, v, grad = (_rows(x) for x in (q, k, v, grad))
        grads = [torch.empty_like(x) for x in (q, k, v)]
        for number, part in enumerate(_chunks(q)):
            weights = kept[number] if kept else _weights(q, k, later, padding, part)
            torch.bmm(weights.mT, grad[part], out=grads[2][part])
            slopes = torch.bmm(grad[part], v[part].mT)
            slopes = torch._softmax_backward_data(slopes, weights, -1, weights.dtype)
            for into, left, right in ((0, slopes, k[part]), (1, slopes.mT, q[part])):
                own = grads[into][part]
                torch.baddbmm(own, left, right, beta=0, alpha=scale, out=own)
        q_grad, k_grad, v_grad = (x.view(shape) for x in grads)
        return q_grad, k_grad, v_grad, None


def _later(q: Tensor) -> Tensor:
    """Minus infinity for positions behind each one's own, else 0: (T, T)."""
    length = q.shape[2]
    return q.new_full((length, length), float("-inf")).triu_(1)


def _weights(q: Tensor, k: Tensor, later: Tensor, padding: Tensor | None, part: slice) -> Tensor:
    """Softmax over the positions up to each one's own, for a part of all rows: (rows, T, T).

    ``padding`` (all rows, 1, C) is True where one of the first C keys is padding.
    """
    scores = torch.baddbmm(later, q[part], k[part].mT, alpha=q.shape[-1] ** -0.5)
    if padding is not None:
        width = padding.shape[-1]
        own = scores.diagonal(dim1=-2, dim2=-1)[:, :width]
        kept = own.clone()
        scores[..., :width].masked_fill_(padding[part], float("-inf"))
        own.copy_(kept)
    return scores.softmax(-1)


def _rows(x: Tensor) -> Tensor:
    """(B, H, T, E) to (B * H, T, E)."""
    return x.reshape(-1, *x.shape[2:])


def _chunks(x: Tensor) -> list[slice]:
    size = max(1, _CHUNK_SCORES // x.shape[1] ** 2)
    return [slice(start, start + size) for start in range(0, len(x), size)]
