"""The blocks of the transformer: RMSNorm, rotary embedding, attention, SwiGLU, stochastic depth.

Shapes: B batch, T positions, L positions including cached ones, D width, H query heads,
K key-value heads, E head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen.config import Grid, TransformerConfig
from llamagen.models.transformer import training_ops


class AttentionMask(NamedTuple):
    """Which positions may attend to which, in the cheapest form that expresses it."""

    causal: bool = False
    """Each position attends to itself and to what stands before it."""
    allowed: Tensor | None = None
    """(B or 1, 1, T, L) bool, where ``causal`` alone does not express it."""
    valid: Tensor | None = None
    """(B, L) bool, where ``allowed`` is causality and padding (False)."""


UpdateCache = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Stores a layer's new keys and values (B, T, K, E); returns those to attend to, (B, K, L, E)."""


class RMSNorm(nn.Module):
    """Root-mean-square norm with statistics in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to the same shape and dtype; in training on a CPU to the dtype of autocast."""
        if x.dtype == self.weight.dtype == torch.float32 and training_ops.should_use(x):
            return training_ops.rms_norm(x, self.weight, self.eps)
        normed = F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps)
        return normed.type_as(x) * self.weight


@functools.lru_cache(maxsize=32)
def rope_table(grid: Grid, head_dim: int, base: float, device: torch.device) -> Tensor:
    """Return cosines and sines of every cell: (rows * columns + 1, E / 2, 2), float32.

    With half = E / 2, the cell (r, c) rotates by the angles [r f, c f], where
    f_i = base^(-2 i / half) for i < half / 2 (rotary embedding: Su et al. 2104.09864).

    The last row, which the cell number -1 selects, is for conditions and holds *zeros*, not the
    cosine 1 of angle 0. The public checkpoints were trained that way: queries and keys of the
    condition are zero vectors, so each code attends to the condition with score 0 while its value
    counts in full.

    The table is a constant, cached per process; callers must not write to it.
    """
    # A table first made while sampling must also serve a later training step.
    with torch.inference_mode(False), torch.no_grad():
        half = head_dim // 2
        exponents = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
        frequencies = 1.0 / base**exponents  # (E / 4,)
        cells = torch.cartesian_prod(*(torch.arange(side, device=device) for side in grid))
        angles = (cells.unsqueeze(-1) * frequencies).flatten(1)  # (rows * columns, E / 2)
        table = torch.stack([angles.cos(), angles.sin()], dim=-1)
        return torch.cat([table, table.new_zeros(1, half, 2)])


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the interleaved pairs of ``x`` (B, T, H, E) by ``rope`` (T, E / 2, 2).

    ``rope`` may also be (B, T, E / 2, 2), where sequences are at different positions. Computed
    in float32, returned in the dtype of ``x``.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, H, E / 2) each
    cos, sin = rope.unsqueeze(-3).unbind(-1)  # (..., T, 1, E / 2) each
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).type_as(x)


class Attention(nn.Module):
    """Causal self-attention with a fused projection and optional grouped queries."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.heads
        self.kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.attention_dropout = config.attention_dropout
        heads = self.heads + 2 * self.kv_heads
        self.wqkv = nn.Linear(config.dim, heads * self.head_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.resid_dropout = training_ops.Dropout(config.residual_dropout)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, rope: Tensor, mask: AttentionMask, cache: UpdateCache | None
    ) -> Tensor:
        """``x`` (B, T, D) with ``rope`` ([B,] T, E / 2, 2) to (B, T, D)."""
        q, k, v = self._heads(self.wqkv(x), rope)
        if cache is not None:
            k, v = cache(self.layer, k.transpose(1, 2), v.transpose(1, 2))
        dropout = self.attention_dropout if self.training else 0.0
        is_causal = dropout == 0 and (mask.causal or mask.valid is not None)
        if self.training and is_causal and training_ops.should_use_causal_attention(q, k):
            out = training_ops.causal_attention(q, k, v, mask.valid)
        else:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask.allowed,
                is_causal=mask.causal and mask.allowed is None,
                dropout_p=dropout,
                enable_gqa=self.kv_heads != self.heads,
            )
        return self.resid_dropout(self.wo(out.transpose(1, 2).flatten(2)))

    def _heads(self, projected: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, (H + 2K) E) to queries, keys and values (B, heads, T, E), RoPE applied."""
        if self.q_norm is None and rope.ndim == 3 and training_ops.should_use(projected):
            return training_ops.rotated_heads(projected, rope, self.heads, self.kv_heads)
        heads = projected.unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2K, E)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.ffn_dropout = training_ops.Dropout(config.ffn_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same shape."""
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 1603.09382): skips a branch for whole sequences."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        """(B, T, D) to the same shape; branches that remain are scaled up to preserve the mean."""
        if not self.training or self.probability == 0.0:
            return branch
        keep = 1.0 - self.probability
        return branch * branch.new_empty(branch.shape[0], 1, 1).bernoulli_(keep).div_(keep)


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each pre-normed with a residual connection."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.drop_path = DropPath(config.drop_path * layer / max(config.layers - 1, 1))

    def forward(
        self, x: Tensor, rope: Tensor, mask: AttentionMask, cache: UpdateCache | None
    ) -> Tensor:
        """``x`` (B, T, D) with ``rope`` ([B,] T, E / 2, 2) to (B, T, D)."""
        x = x + self.drop_path(self.attention(self.attention_norm(x), rope, mask, cache))
        return x + self.drop_path(self.feed_forward(self.ffn_norm(x)))
