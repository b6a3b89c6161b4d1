"""Milliseconds per code: our decode loop against a plain eager one, weights drawn at random.

The plain loop is what a straightforward implementation does: attention over the whole
preallocated cache under a mask, the filters by a full sort, ``torch.multinomial`` for the draw.
Both run preset B with guidance and top-k 2000 in the same process, in turn.

    python benchmarks/decoding.py --images 1 8 --repeats 5
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
from llamagen.devices import DTYPES, find_device, find_dtype
from llamagen.generation import generate_codes
from llamagen.transformer import Transformer, apply_rope, rope_table

SAMPLING = SamplingConfig(guidance_scale=4.0, top_k=2000)


@torch.inference_mode()
def plain_codes(model: Transformer, labels: Tensor, count: int) -> Tensor:
    """The first ``count`` codes of images of ``labels``, by the plain loop."""
    config = model.config
    images, device, dtype = labels.shape[0], model.device, model.dtype
    length = config.condition_length + config.num_codes
    shape = (config.layers, 2 * images, config.num_kv_heads, length, config.head_dim)
    keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
    rope = rope_table(
        config.grid, config.condition_length, config.head_dim, config.rope_base, device
    )
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()

    def forward(x: Tensor, position: int) -> Tensor:
        for layer, block in enumerate(model.layers):
            attention = block.attention
            heads = attention.wqkv(block.attention_norm(x)).unflatten(-1, (-1, config.head_dim))
            q, k, v = heads.split([config.heads, config.num_kv_heads, config.num_kv_heads], dim=2)
            turn = rope[position : position + 1]
            q, k, v = (t.transpose(1, 2) for t in (apply_rope(q, turn), apply_rope(k, turn), v))
            keys[layer, :, :, position : position + 1] = k
            values[layer, :, :, position : position + 1] = v
            allowed = mask[None, None, position : position + 1]
            out = F.scaled_dot_product_attention(q, keys[layer], values[layer], attn_mask=allowed)
            x = x + attention.wo(out.transpose(1, 2).flatten(2))
            x = x + block.feed_forward(block.ffn_norm(x))
        return model.output(model.norm(x))[:, -1].float()

    both = torch.cat([labels, torch.full_like(labels, config.num_classes)])
    logits = forward(model.cls_embedding(both), 0)
    codes = []
    for index in range(count):
        cond, uncond = logits.chunk(2)
        logits = uncond + SAMPLING.guidance_scale * (cond - uncond)
        ordered = logits.sort(dim=-1, descending=True).values
        logits = logits.masked_fill(logits < ordered[:, SAMPLING.top_k - 1 : SAMPLING.top_k], -1e9)
        drawn = torch.multinomial(logits.softmax(-1), 1)
        codes.append(drawn)
        logits = forward(model.tok_embeddings(drawn.repeat(2, 1)), config.condition_length + index)
    return torch.cat(codes, dim=1)


def measure(model: Transformer, images: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds per code of both loops."""
    labels = torch.arange(images, device=model.device)
    count = model.config.num_codes
    candidates: dict[str, Callable[[], object]] = {
        "plain": lambda: plain_codes(model, labels, count),
        "llamagen": lambda: generate_codes(model, labels, seeds=range(images), sampling=SAMPLING),
    }
    seconds = time_in_turn(candidates, repeats=repeats)
    return {name: [1000 * s / count for s in values] for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="B")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", nargs="+", default=None, choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = find_device(arguments.device)
    dtypes = [find_dtype(name, device) for name in arguments.dtype or [None]]
    rows, results = [], []
    for dtype in dtypes:
        model = Transformer(preset(TRANSFORMER_PRESETS, arguments.preset)).to(device, dtype).eval()
        torch.nn.init.normal_(model.output.weight, std=0.02)
        for images in arguments.images:
            found = measure(model, images, arguments.repeats)
            plain, ours = (statistics.median(found[name]) for name in ("plain", "llamagen"))
            name = str(dtype).removeprefix("torch.")
            rows.append(
                [
                    arguments.preset,
                    name,
                    f"{images} ({2 * images} rows)",
                    median_and_spread(found["plain"]),
                    median_and_spread(found["llamagen"]),
                    f"{plain / ours:.2f}",
                ]
            )
            results.append(
                {"preset": arguments.preset, "dtype": name, "images": images, "ms_per_code": found}
            )
    print_table(
        ["preset", "dtype", "images", "plain loop, ms/code", "llamagen, ms/code", "ratio"], rows
    )
    record(f"decoding-{arguments.preset}", results)


if __name__ == "__main__":
    main()
