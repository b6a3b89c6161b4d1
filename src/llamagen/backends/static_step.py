"""A step of decoding that a GPU can do again and again without the host: one graph of kernels.

It does what the model's blocks do, in fewer kernels, and differs from them by rounding only. All
that changes from step to step is read from tensors on the device; shapes depend only on the number
of sequences, the codes fed to each and the positions that attention reaches over.

Shapes: R sequences, T codes fed to each, L positions of the cache, A of them attended, D width, H
query heads, K key-value heads, G = H / K of them for each, E head dimension, V codes of the
codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen.models.transformer.blocks import RMSNorm
from llamagen.models.transformer.model import Transformer
from llamagen.models.transformer.quantized import QuantizedLinear


@dataclass
class StepInputs:
    """What a step reads besides weights and cache."""

    codes: Tensor
    """(R, T) int64, what is fed."""
    filled: Tensor
    """(R,) int64, positions filled: where the keys and values of the first code go."""
    conditions: Tensor
    """(R,) int64, positions of the condition."""
    kept: Tensor
    """(R, L) bool, False where the condition is padding."""


def static_step(
    model: Transformer,
    inputs: StepInputs,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    turns: Tensor,
    attended: int,
) -> Tensor:
    """Writes keys and values of the codes behind each sequence's own; logits (R, T, V).

    Args:
        model: in eval mode.
        inputs: of the sequences.
        keys: (R, K, L, E) of each layer; numbers beyond those filled must be finite.
        values: likewise.
        turns: (codes of an image, E / 2) complex64, ``rope_table`` without a condition.
        attended: A, no less than the longest sequence with the codes that it is fed.
    """
    config = model.config
    rows, window = inputs.codes.shape
    places = inputs.filled.unsqueeze(1) + torch.arange(window, device=inputs.filled.device)
    sequences = torch.arange(rows, device=places.device).unsqueeze(1)
    # Past an image's last code a window has that code's turn, as in SlotCache.cells.
    cells = (places - inputs.conditions.unsqueeze(1)).clamp_(max=len(turns) - 1)
    turn = turns[cells].flatten(0, 1).unsqueeze(1)  # (R * T, 1, E / 2)
    groups = config.heads // config.num_kv_heads
    bias = _bias(inputs.kept, places, attended, groups, model.dtype)
    x = model.tok_embeddings(inputs.codes).flatten(0, 1)  # (R * T, D), changed in place below
    for block, own_keys, own_values in zip(model.blocks, keys, values, strict=True):
        attention, feed_forward = block.attention, block.feed_forward
        heads = attention.wqkv(_normed(x, block.attention_norm)).unflatten(
            -1, (-1, config.head_dim)
        )
        turned = _turned(heads[:, : -config.num_kv_heads], turn).unflatten(0, (rows, window))
        q, k = turned.split([config.heads, config.num_kv_heads], dim=2)  # (R, T, heads, E)
        own_keys[sequences, :, places] = k
        own_values[sequences, :, places] = heads[:, -config.num_kv_heads :].unflatten(
            0, (rows, window)
        )
        # The queries of a group are more queries of one head.
        q = q.transpose(1, 2).unflatten(1, (-1, groups)).flatten(2, 3)  # (R, K, G * T, E)
        out = attend(q, own_keys[:, :, :attended], own_values[:, :, :attended], bias)
        out = out.unflatten(2, (groups, window)).flatten(1, 2)  # (R, H, T, E)
        _add_product(x, attention.wo, out.transpose(1, 2).flatten(2).flatten(0, 1))
        normed = _normed(x, block.ffn_norm)
        hidden = F.silu(feed_forward.w1(normed)) * feed_forward.w3(normed)
        _add_product(x, feed_forward.w2, hidden)
    logits: Tensor = model.output(_normed(x, model.norm))
    return logits.unflatten(0, (rows, window))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention of queries (R, K, Q, E) to keys and values (R, K, A, E), under a bias on scores.

    ``bias`` (R, 1, Q, A), of the same dtype. Returns (R, K, Q, E).
    """
    # CUDA's fused kernels that take a bias want heads of whole 16 bytes. Without them torch would
    # widen all keys and values to float32 at each step. Preset 3B has heads of 100.
    if q.shape[-1] * q.itemsize % 16 == 0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.mT) + bias
    return torch.matmul(scores.softmax(-1, dtype=torch.float32).type_as(v), v)


def _bias(kept: Tensor, places: Tensor, attended: int, groups: int, dtype: torch.dtype) -> Tensor:
    """(R, 1, G * T, A): 0 where the code at a place (R, T) attends to a position, else -inf."""
    index = torch.arange(attended, device=places.device)
    allowed = (index <= places.unsqueeze(-1)) & kept[:, None, :attended]  # (R, T, A)
    allowed = allowed.repeat(1, groups, 1)
    # The fused kernels read a bias as it lies only if its rows begin at multiples of 16 bytes.
    shape = (*allowed.shape[:2], -(-attended // 16) * 16)
    bias = torch.full(shape, -torch.inf, device=places.device, dtype=dtype)[..., :attended]
    return bias.masked_fill_(allowed, 0.0).unsqueeze(1)


def _normed(x: Tensor, norm: RMSNorm) -> Tensor:
    """The norm in one kernel: (R * T, D) to the same."""
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.eps)


def _turned(heads: Tensor, turn: Tensor) -> Tensor:
    """``apply_rope`` with complex numbers: heads (R * T, heads, E), turn (R * T, 1, E / 2)."""
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).type_as(heads)


def _add_product(x: Tensor, linear: nn.Linear | QuantizedLinear, inputs: Tensor) -> None:
    """Adds what a layer makes of ``inputs`` (R * T, inputs) to ``x`` (R * T, outputs)."""
    if isinstance(linear, QuantizedLinear):
        x.add_(linear(inputs))
    else:
        # The product's own kernel adds.
        x.addmm_(inputs, linear.weight.mT)
