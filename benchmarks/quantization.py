"""Predictions with weights, keys and values in 8 bits, compared with float32.

    python benchmarks/quantization.py emoji emoji/held-out.csv emoji/train.csv --images 500 \
        --picture docs/images/quantization.png

Images with captions, or with the model's classes, are encoded once, by the tokenizer in float32.
Every way of storing and computing the transformer then predicts each code from the true codes
before it and the caption or class, which is encoded in that way's precision. Measured are

- bits per code, as ``llamagen evaluate likelihood`` has them, and by how much they exceed those
  in float32;
- divergence: the Kullback-Leibler divergence of the predicted distribution from that in float32,
  in bits;
- same: the share of positions at which the most likely code is the same.

Means are over all codes; their standard errors, behind ±, are over images. Of a model that is
stored in bfloat16, float32 means the same weights, computed with in float32.

Shapes: B images of a batch, T codes of an image, V codes of the codebook.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from common import evenly, print_table, record
from PIL import Image
from torch import Tensor

from llamagen import Pipeline
from llamagen.config import KVCacheDType, Quantization
from llamagen.evaluation.image_sets import CollectedImages, ImageSet
from llamagen.models.tokenizer import uint8_to_images
from llamagen.models.transformer import NO_CELL, Tokens, Transformer
from llamagen.support.pictures import image_grid, save_png, stacked, titled

REFERENCE = "float32"
WAYS: dict[str, tuple[Quantization | None, str, KVCacheDType]] = {
    REFERENCE: (None, "float32", "auto"),
    "bfloat16": (None, "bfloat16", "auto"),
    "int8": ("int8", "float32", "auto"),
    "int8, bfloat16": ("int8", "bfloat16", "auto"),
    "int8 cache": (None, "float32", "int8"),
    "int8 cache, bfloat16": (None, "bfloat16", "int8"),
    "int8 and int8 cache, bfloat16": ("int8", "bfloat16", "int8"),
}
"""Precision of the weights, of the computation, and of keys and values."""
SHOWN_WAYS = (REFERENCE, "bfloat16", "int8, bfloat16", "int8 and int8 cache, bfloat16")
"""Rows of the picture."""
SHOWN = 8
"""Prompts of the picture, spread evenly over the last images that were named."""


def load(model: str, way: str) -> Pipeline:
    quantization, dtype, cache = WAYS[way]
    return Pipeline.from_pretrained(model, dtype=dtype).quantize(quantization, kv_cache_dtype=cache)


def divergence(reference: Tensor, other: Tensor) -> Tensor:
    """Of logits (..., V) from those of the reference (..., V), in bits: (...)."""
    p, q = (logits.double().log_softmax(-1) for logits in (reference, other))
    return (p.exp() * (p - q)).sum(-1) / math.log(2)


def code_bits(logits: Tensor, codes: Tensor) -> Tensor:
    """Bits (B, T) of ``codes`` (B, T) by logits (B, T, V)."""
    log_probabilities = logits.double().log_softmax(-1)
    return -log_probabilities.gather(-1, codes.unsqueeze(-1)).squeeze(-1) / math.log(2)


def prompts_of(images: ImageSet) -> list[str]:
    """Caption or class of every image."""
    if images.captions is not None:
        return list(images.captions)
    assert images.labels is not None, f"{images.name} has neither captions nor classes"
    return [images.class_names[label] for label in images.labels]


@torch.inference_mode()
def measure(
    pipes: dict[str, Pipeline], images: ImageSet, limit: int
) -> dict[str, dict[str, float]]:
    """Each way's measures on up to ``limit`` images, spread evenly over all."""
    chosen = evenly(len(images), limit)
    prompts = prompts_of(images)
    found: dict[str, list[Tensor]] = {way: [] for way in pipes}
    for part in np.array_split(chosen, math.ceil(len(chosen) / 16)):
        pixels = np.concatenate([images.read(index, index + 1) for index in part])
        batch = uint8_to_images(torch.from_numpy(pixels).movedim(-1, 1))
        codes = pipes[REFERENCE].tokenizer.encode(batch).flatten(1)
        wanted = [prompts[index] for index in part]
        reference = predicted(pipes[REFERENCE], codes, wanted)
        for way, pipe in pipes.items():
            logits = reference if way == REFERENCE else predicted(pipe, codes, wanted)
            same = logits.argmax(-1) == reference.argmax(-1)
            of_codes = (code_bits(logits, codes), divergence(reference, logits), same.double())
            found[way].append(torch.stack([values.mean(1) for values in of_codes]))  # (3, B)
    of_images = {way: torch.cat(parts, dim=1) for way, parts in found.items()}
    return {
        way: summary(values, values[0] - of_images[REFERENCE][0])
        for way, values in of_images.items()
    }


@torch.inference_mode()
def predicted(pipe: Pipeline, codes: Tensor, prompts: list[str]) -> Tensor:
    """Logits (B, T, V) of each of ``codes`` (B, T), given the ones before it and its prompt."""
    model = pipe.transformer
    found = []
    for own, given in zip(codes, pipe.conditions(prompts), strict=True):
        if model.kv_cache_dtype is None:
            logits = model(own[None, :-1], given.condition[None].to(model.device))[0]
        else:
            logits = predicted_with_cache(model, own, given.condition.to(model.device))
        found.append(logits.float())
    return torch.stack(found)


def predicted_with_cache(model: Transformer, codes: Tensor, condition: Tensor) -> Tensor:
    """Logits (T, V) of ``codes`` (T,), from keys and values as the cache rounds them."""
    length = 1 if condition.ndim == 0 else len(condition)
    cache = model.new_cache(1, length + len(codes))
    cache.add(1)
    is_class = condition.ndim == 0
    first = Tokens(
        ids=condition[None] + model.config.codebook_size if is_class else codes.new_zeros(length),
        sequences=np.zeros(length, np.int32),
        positions=np.arange(length, dtype=np.int32),
        cells=np.full(length, NO_CELL, np.int32),
        wanted=np.array([length - 1]),
        features=None if is_class else condition,
    )
    count = len(codes) - 1
    rest = Tokens(
        ids=codes[:-1],
        sequences=np.zeros(count, np.int32),
        positions=np.arange(length, length + count, dtype=np.int32),
        cells=np.arange(count, dtype=np.int32),
        wanted=np.arange(count),
    )
    return torch.cat([model.step(tokens, cache) for tokens in (first, rest)])


def summary(values: Tensor, more: Tensor) -> dict[str, float]:
    """Means and standard errors over images.

    ``values`` (3, images) are bits per code, divergence and share of the same most likely code;
    ``more`` (images,) is the difference of the bits to those in float32.
    """
    bits, divergences, same = values
    result = {"images": len(bits), "bits per code": float(bits.mean())}
    for name, each in (("more bits", more), ("divergence", divergences), ("same", same)):
        result[name] = float(each.mean())
        result[f"{name}, error"] = float(each.std()) / math.sqrt(len(each))
    return result


def picture(pipes: dict[str, Pipeline], prompts: list[str], seed: int) -> Image.Image:
    """A row for each of ``SHOWN_WAYS``, a column for each prompt, which has a seed of its own."""
    rows = []
    for way in SHOWN_WAYS:
        images = pipes[way](prompts, seed=seed).images
        captions = prompts if way == SHOWN_WAYS[-1] else None
        rows.append(
            titled(image_grid(images, columns=len(prompts), captions=captions, scale=2), way)
        )
    return stacked(rows, gap=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="name, pipeline folder or hub repository")
    parser.add_argument("sources", nargs="+", help="images: held-out ones first")
    parser.add_argument("--images", type=int, default=500, help="of each source, at most")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the picture's first column")
    parser.add_argument("--name", help="of the record; by default the model's")
    arguments = parser.parse_args()
    pipes = {way: load(arguments.model, way) for way in WAYS}
    pipe = pipes[REFERENCE]
    side = pipe.transformer.config.grid[0] * pipe.tokenizer.config.downsampling
    results = {}
    for source in arguments.sources:
        images = CollectedImages(source, size=side)
        name = Path(source).stem
        results[name] = measure(pipes, images, arguments.images)
        print_table(
            [
                name,
                "bits per code",
                "more than float32",
                "divergence, bits",
                "same most likely code",
            ],
            [
                [
                    way,
                    f"{m['bits per code']:.3f}",
                    f"{m['more bits']:+.4f} ± {m['more bits, error']:.4f}",
                    f"{m['divergence']:.5f} ± {m['divergence, error']:.5f}",
                    f"{100 * m['same']:.1f} %",
                ]
                for way, m in results[name].items()
            ],
        )
    if arguments.picture is not None:
        prompts = prompts_of(images)
        shown = [prompts[index] for index in evenly(len(prompts), SHOWN)]
        save_png(picture(pipes, shown, arguments.seed), arguments.picture)
    record(f"quantization-{arguments.name or pipe.name}", results)


if __name__ == "__main__":
    main()
