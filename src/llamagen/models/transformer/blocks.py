"""The blocks of the transformer: RMSNorm, attention, SwiGLU, stochastic depth.

Shapes: B batch, T positions, L positions including cached ones, D width, H query heads,
K key-value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen.config import TransformerConfig
from llamagen.models.transformer import training_ops
from llamagen.models.transformer.rope import apply_rope


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
