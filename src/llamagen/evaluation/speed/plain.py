"""The decode loop as it is usually written: what ours is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen.config import SamplingConfig
from llamagen.models.transformer import Transformer, apply_rope, rope_table


@torch.inference_mode()
def plain_codes(model: Transformer, labels: Tensor, count: int, sampling: SamplingConfig) -> Tensor:
    """The first ``count`` codes (B, count) of images of ``labels`` (B,), by a plain loop.

    Attention goes over the whole preallocated cache under a mask, top-k is a full sort, the draw
    ``torch.multinomial``: eager torch, operation by operation. ``sampling`` needs a guidance scale
    and a top-k.
    """
    config = model.config
    images, device, dtype = labels.shape[0], model.device, model.dtype
    length = config.condition_length + config.num_codes
    shape = (config.layers, 2 * images, config.num_kv_heads, length, config.head_dim)
    keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
    rope = rope_table(config.grid, config.head_dim, config.rope_base, device)
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()

    def forward(x: Tensor, position: int) -> Tensor:
        for layer, block in enumerate(model.blocks):
            attention = block.attention
            heads = attention.wqkv(block.attention_norm(x)).unflatten(-1, (-1, config.head_dim))
            q, k, v = heads.split([config.heads, config.num_kv_heads, config.num_kv_heads], dim=2)
            angles = rope[position - config.condition_length].unsqueeze(0)  # -1: the condition
            q, k = apply_rope(q, angles), apply_rope(k, angles)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            keys[layer, :, :, position : position + 1] = k
            values[layer, :, :, position : position + 1] = v
            allowed = mask[None, None, position : position + 1]
            out = F.scaled_dot_product_attention(q, keys[layer], values[layer], attn_mask=allowed)
            x = x + attention.wo(out.transpose(1, 2).flatten(2))
            x = x + block.feed_forward(block.ffn_norm(x))
        logits: Tensor = model.output(model.norm(x))[:, -1].float()
        return logits

    both = torch.cat([labels, torch.full_like(labels, config.num_classes)])
    logits = forward(model.cls_embedding(both), 0)
    codes = []
    for index in range(count):
        cond, uncond = logits.chunk(2)
        logits = uncond + sampling.guidance_scale * (cond - uncond)
        ordered = logits.sort(dim=-1, descending=True).values
        last = min(sampling.top_k, config.codebook_size) - 1
        logits = logits.masked_fill(logits < ordered[:, last : last + 1], -1e9)
        drawn = torch.multinomial(logits.softmax(-1), 1)
        codes.append(drawn)
        logits = forward(model.tok_embeddings(drawn.repeat(2, 1)), config.condition_length + index)
    return torch.cat(codes, dim=1)
