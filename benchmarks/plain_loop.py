"""Milliseconds per code of the decode loop as it is usually written, and of ours.

    python benchmarks/plain_loop.py --preset B --images 1 8 32

Whole images with guidance and top-k of a class-conditional transformer with random weights, both
in turn.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import median_and_spread, print_table, record, time_in_turn
from torch import Tensor

from llamagen.config import TRANSFORMER_PRESETS, SamplingConfig, preset
from llamagen.evaluation.speed import SAMPLING
from llamagen.generation import generate_codes
from llamagen.models.transformer import Transformer, apply_rope, rope_table
from llamagen.support.devices import find_device, find_dtype

PLAIN, OURS = "plain loop", "llamagen"


@torch.inference_mode()
def plain_codes(model: Transformer, labels: Tensor, count: int, sampling: SamplingConfig) -> Tensor:
    """Return the first ``count`` codes (B, count) of images of ``labels`` (B,).

    Attention goes over the whole preallocated cache under a mask, top-k is a full sort, sampling
    is ``torch.multinomial``: eager torch, operation by operation. ``sampling`` needs a guidance
    scale and a top-k.
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
        sampled = torch.multinomial(logits.softmax(-1), 1)
        codes.append(sampled)
        logits = forward(
            model.tok_embeddings(sampled.repeat(2, 1)), config.condition_length + index
        )
    return torch.cat(codes, dim=1)


def run_of(model: Transformer, labels: Tensor, way: str) -> Callable[[], object]:
    if way == PLAIN:
        return lambda: plain_codes(model, labels, model.config.num_codes, SAMPLING)
    return lambda: generate_codes(model, labels, seeds=range(len(labels)), sampling=SAMPLING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="B")
    parser.add_argument("--images", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    device = find_device("auto")
    torch.manual_seed(0)
    config = preset(TRANSFORMER_PRESETS, arguments.preset)
    model = Transformer(config).to(device, find_dtype(arguments.dtype, device)).eval()
    # The initial output head is zero, so that all codes would be equally likely.
    torch.nn.init.normal_(model.output.weight, std=0.02)
    rows, results = [], []
    for images in arguments.images:
        labels = torch.arange(images, device=device)
        runs = {way: run_of(model, labels, way) for way in (PLAIN, OURS)}
        seconds = time_in_turn(runs, repeats=arguments.repeats)
        per_code = 1000 / config.num_codes
        ratio = statistics.median(seconds[PLAIN]) / statistics.median(seconds[OURS])
        cells = [median_and_spread(values, unit=per_code) for values in seconds.values()]
        rows.append([f"{images} ({2 * images} rows)", *cells, f"{ratio:.2f}x"])
        results.append({"images": images, "seconds": seconds})
    print_table(["images", f"{PLAIN}, ms/code", f"{OURS}, ms/code", "ratio"], rows)
    record(f"plain-loop-{arguments.preset}", {"dtype": str(model.dtype), "runs": results})


if __name__ == "__main__":
    main()
