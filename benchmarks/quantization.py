"""What a model loses by weights, keys and values in 8 bits: predictions against float32.

    python benchmarks/quantization.py emoji emoji/held-out.csv emoji/train.csv --images 500 \
        --picture docs/images/quantization.png

Images with captions, or with the model's classes, are encoded once, by the tokenizer in float32.
Every way of storing and computing the transformer then predicts each code from the true codes
before it and the caption or class, which the text encoder reads in that way's precision. Measured
are

- bits per code, as ``llamagen evaluate likelihood`` has them, and by how much they exceed those
  in float32;
- divergence: the Kullback-Leibler divergence of the predicted distribution from that in float32,
  in bits;
- same: the share of positions at which the likeliest code is the same.

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
from common import print_table, record
from PIL import Image
from torch import Tensor

from llamagen import Pipeline
from llamagen.config import KVCacheDType, Quantization
from llamagen.evaluation.image_sets import CollectedImages, ImageSet
from llamagen.models.tokenizer import uint8_to_images
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
"""How weights are stored, what is computed with, and how keys and values are kept."""
SHOWN_WAYS = (REFERENCE, "bfloat16", "int8, bfloat16", "int8 and int8 cache, bfloat16")
"""What the picture shows."""
SHOWN = 8
"""Prompts of the picture, spread evenly over the last images that were named."""


def load(model: str, way: str) -> Pipeline:
    quantization, dtype, kept = WAYS[way]
    return Pipeline.from_pretrained(model, dtype=dtype).quantize(quantization, kv_cache_dtype=kept)


def divergence(reference: Tensor, other: Tensor) -> Tensor:
    """Of logits (..., V) from those of the reference (..., V), in bits: (...)."""
    p, q = (logits.double().log_softmax(-1) for logits in (reference, other))
    return (p.exp() * (p - q)).sum(-1) / math.log(2)


def code_bits(logits: Tensor, codes: Tensor) -> Tensor:
    """What ``codes`` (B, T) cost by logits (B, T, V): (B, T)."""
    chances = logits.double().log_softmax(-1)
    return -chances.gather(-1, codes.unsqueeze(-1)).squeeze(-1) / math.log(2)


def prompts_of(images: ImageSet) -> list[str]:
    """Caption or class of every image."""
    if images.captions is not None:
        return list(images.captions)
    assert images.labels is not None, f"{images.name} has neither captions nor classes"
    return [images.class_names[label] for label in images.labels]


@torch.inference_mode()
def measure(pipes: dict[str, Pipeline], images: ImageSet, most: int) -> dict[str, dict[str, float]]:
    """Each way's measures on up to ``most`` images, spread evenly over all."""
    chosen = evenly(len(images), most)
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


def predicted(pipe: Pipeline, codes: Tensor, prompts: list[str]) -> Tensor:
    """Logits (B, T, V) of each of ``codes`` (B, T), given the ones before it and its prompt."""
    given, model = pipe.conditions(prompts), pipe.transformer
    if model.kv_cache_dtype is None:
        return model(codes[:, :-1], given.condition, condition_mask=given.mask).float()
    # With all of them in the cache, which gives back what it has rounded.
    length = 1 if given.condition.ndim == 1 else given.condition.shape[1]
    cache = model.new_cache(len(codes), condition_length=length)
    first = model.prefill(given.condition, cache, condition_mask=given.mask)
    return torch.cat([first.unsqueeze(1), model.decode(codes[:, :-1], cache)], dim=1).float()


def summary(values: Tensor, more: Tensor) -> dict[str, float]:
    """Means and standard errors over images.

    ``values`` (3, images) are bits per code, divergence and share of the same likeliest code;
    ``more`` (images,) is by how much the bits exceed those in float32.
    """
    bits, divergences, same = values
    result = {"images": len(bits), "bits per code": float(bits.mean())}
    for name, each in (("more bits", more), ("divergence", divergences), ("same", same)):
        result[name] = float(each.mean())
        result[f"{name}, error"] = float(each.std()) / math.sqrt(len(each))
    return result


def evenly(count: int, most: int) -> np.ndarray:
    """At most so many of ``count`` numbers, spread evenly."""
    return np.arange(min(count, most)) * count // min(count, most)


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
        images = CollectedImages.open(source, size=side)
        name = Path(source).stem
        results[name] = measure(pipes, images, arguments.images)
        print_table(
            [name, "bits per code", "more than float32", "divergence, bits", "same likeliest code"],
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
