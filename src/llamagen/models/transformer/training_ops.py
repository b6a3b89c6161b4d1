"""Operations of training that torch is slow at on a CPU, computed another way there.

Each computes what a module of ``blocks`` defines in few passes over memory, most of them with a
backward pass of their own. ``should_use`` says when.

Shapes: B batch, H heads, K key-value heads, T positions, E head dimension, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_CHUNK_SCORES = 1 << 21
"""Scores computed at a time: 4 MB in bfloat16, which fits into caches; measured on Zen 4."""
_MAX_LENGTH = 768
"""Positions up to which plain products beat torch's fused attention; measured on Zen 5."""
_MAX_STORED_LENGTH = 384
"""Positions up to which attention stores its weights for the backward pass instead of recomputing
them. With heads of 64 that is at most six times the memory of its output."""


def should_use(x: Tensor) -> bool:
    """Whether to use this module for ``x``: on a CPU, where gradients are wanted."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class Dropout(nn.Dropout):
    """Dropout whose random numbers cost a sixth on a CPU.

    torch generates 64 random bits for each element there. Here they serve four elements, and the
    probability is rounded to a multiple of 1/65536.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        elsewhere = x.device.type != "cpu" or torch.compiler.is_compiling()
        if elsewhere or not self.training or self.p in (0.0, 1.0):
            return super().forward(x)
        count = x.numel()
        random = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        threshold = round(self.p * 65536) - 32768
        scale = torch.tensor(1.0 / (1.0 - self.p), dtype=x.dtype)
        uniform = random.view(torch.int16)[:count].view(x.shape)
        if x.dtype != torch.bfloat16 or threshold > 32767:
            return x * (uniform >= threshold).to(x.dtype).mul_(scale)
        # In place, to 0 or the bits of the scale: a third of the time, because torch converts
        # booleans slowly.
        return x * uniform.ge_(threshold).mul_(scale.view(torch.int16)).view(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the root-mean-square norm of ``x`` (..., D) float32, times ``weight`` (D,).

    Rounded once, to the precision of autocast where it is on: what follows is a product.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    out: Tensor = _RMSNorm.apply(x, weight, eps, dtype)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = lengths.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x * scale, weight, out=torch.empty_like(x, dtype=dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        shape, width = x.shape, x.shape[-1]
        x, grad, scale = (part.reshape(-1, part.shape[-1]) for part in (x, grad, scale))
        products = x * grad
        weight_grad = products.T @ scale.squeeze(-1)
        # The part of the gradient along x changes its length only, which the norm cancels.
        radial = (products @ weight).unsqueeze(-1).mul_(scale**3).div_(width)
        x_grad = (grad * weight).mul_(scale).addcmul_(x, radial, value=-1)
        return x_grad.view(shape), weight_grad, None, None


def rotated_heads(
    projected: Tensor, rope: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split ``projected`` (B, T, (H + 2K) E); rotate by ``rope`` (T, E / 2, 2), see ``apply_rope``.

    Returns queries (B, H, T, E), keys and values (B, K, T, E), the first two rotated.
    """
    q, k, v = _RotatedHeads.apply(projected, rope, heads, kv_heads)
    return q, k, v


class _RotatedHeads(torch.autograd.Function):
    """Rotating a pair multiplies complex numbers; the backward pass, by the conjugate."""

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, rope: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rope)
        ctx.counts = [heads, kv_heads, kv_heads]
        parts = projected.unflatten(-1, (sum(ctx.counts), -1))  # (B, T, H + 2K, E)
        unrotated, v = parts.split([heads + kv_heads, kv_heads], dim=2)
        rotated = _empty_float32(unrotated).copy_(unrotated)
        _pairs(rotated).mul_(torch.view_as_complex(rope).unsqueeze(1))
        q, k = rotated.split(ctx.counts[:2], dim=2)
        to = {"copy": True, "memory_format": torch.contiguous_format}
        return tuple(part.transpose(1, 2).to(projected.dtype, **to) for part in (q, k, v))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (rope,) = ctx.saved_tensors
        q, k, v = (grad.transpose(1, 2) for grad in grads)
        batch, length, heads, width = q.shape
        out = q.new_empty(batch, length, sum(ctx.counts), width)
        last = heads + k.shape[2]
        rotated = _empty_float32(out[:, :, :last])
        rotated[:, :, :heads] = q
        rotated[:, :, heads:] = k
        _pairs(rotated).mul_(torch.view_as_complex(rope).conj().unsqueeze(1))
        out[:, :, :last] = rotated
        out[:, :, last:] = v
        return out.flatten(2), None, None, None


def _empty_float32(x: Tensor) -> Tensor:
    """Return an empty contiguous tensor of the shape of ``x``, in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _pairs(x: Tensor) -> Tensor:
    """View neighbouring pairs of the last dimension as complex numbers."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def should_use_causal_attention(q: Tensor, k: Tensor) -> bool:
    """Whether ``causal_attention`` is the faster one for these queries and keys (B, H, T, E)."""
    fits = q.dtype == torch.bfloat16 and q.shape == k.shape and q.shape[2] <= _MAX_LENGTH
    return should_use(q) and fits


def causal_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return attention of each position to itself and those before it: all (B, H, T, E).

    Matrix products over a few heads at a time, so that their scores stay in caches. Beyond
    ``_MAX_STORED_LENGTH`` positions they are recomputed in the backward pass, and no more than one
    chunk of them is ever in memory. Scores are rounded to the input's precision, as unfused
    attention under autocast does. What is False in ``valid`` (B, T) is padding, which only itself
    attends to.
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
        stored = []
        queries, keys, values = (_rows(x) for x in (q, k, v))
        out, bias = torch.empty_like(queries), _causal_bias(q)
        for part in _chunks(queries):
            weights = _weights(queries, keys, bias, padding, part)
            torch.bmm(weights, values[part], out=out[part])
            if q.shape[2] <= _MAX_STORED_LENGTH:
                stored.append(weights)
        ctx.save_for_backward(q, k, v, padding, *stored)
        return out.view(q.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        shape, scale = grad.shape, grad.shape[-1] ** -0.5
        q, k, v, padding, *stored = ctx.saved_tensors
        bias = _causal_bias(q)
        q, k, v, grad = (_rows(x) for x in (q, k, v, grad))
        grads = [torch.empty_like(x) for x in (q, k, v)]
        for number, part in enumerate(_chunks(q)):
            weights = stored[number] if stored else _weights(q, k, bias, padding, part)
            torch.bmm(weights.mT, grad[part], out=grads[2][part])
            grad_scores = torch.bmm(grad[part], v[part].mT)
            grad_scores = torch._softmax_backward_data(grad_scores, weights, -1, weights.dtype)
            for into, left, right in ((0, grad_scores, k[part]), (1, grad_scores.mT, q[part])):
                own = grads[into][part]
                torch.baddbmm(own, left, right, beta=0, alpha=scale, out=own)
        q_grad, k_grad, v_grad = (x.view(shape) for x in grads)
        return q_grad, k_grad, v_grad, None


def _causal_bias(q: Tensor) -> Tensor:
    """Return (T, T): minus infinity where a key stands behind its query, else 0."""
    length = q.shape[2]
    return q.new_full((length, length), float("-inf")).triu_(1)


def _weights(q: Tensor, k: Tensor, bias: Tensor, padding: Tensor | None, part: slice) -> Tensor:
    """Attention weights of some rows, causal: (rows, T, T).

    ``padding`` (all rows, 1, C) is True where one of the first C keys is padding.
    """
    scores = torch.baddbmm(bias, q[part], k[part].mT, alpha=q.shape[-1] ** -0.5)
    if padding is not None:
        width = padding.shape[-1]
        own = scores.diagonal(dim1=-2, dim2=-1)[:, :width]
        diagonal = own.clone()
        scores[..., :width].masked_fill_(padding[part], float("-inf"))
        own.copy_(diagonal)
    return scores.softmax(-1)


def _rows(x: Tensor) -> Tensor:
    """(B, H, T, E) to (B * H, T, E)."""
    return x.reshape(-1, *x.shape[2:])


def _chunks(x: Tensor) -> list[slice]:
    size = max(1, _CHUNK_SCORES // x.shape[1] ** 2)
    return [slice(start, start + size) for start in range(0, len(x), size)]
