"""How likely a model finds held-out images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from llamagen.evaluation.image_sets import ImageSet
from llamagen.evaluation.likelihood import Likelihood, measure_likelihood
from llamagen.evaluation.report import Picture, Report, Table
from llamagen.pipeline import Pipeline

_ONLY_CODES = (
    "the bits are those of the codes: what the image tokenizer lost is not counted, so models with "
    "different tokenizers cannot be compared"
)
_MAP_SIDE = 320
"""Side in pixels of the map, about."""


def evaluate_likelihood(pipeline: Pipeline, images: ImageSet, out: Path) -> Report:
    """Measures bits per code and per pixel; to be called in every process.

    Raises:
        InputError: images and model do not fit together.
        OSError: the disk is full.
    """
    found = measure_likelihood(pipeline, images, out)
    tables = [_per_class(found, images)] if images.labels is not None else []
    return Report(
        protocol="likelihood",
        title=f"{pipeline.name} on {images.name}",
        metrics={
            "bits_per_code": found.bits_per_code,
            "bits_per_code_unconditional": found.bits_per_code_unconditional,
            "bits_per_pixel": found.bits_per_pixel,
        },
        reference={"source": "none: likelihood needs no other images"},
        samples={
            "source": images.name,
            "images": len(images),
            "size": f"{images.size[1]}x{images.size[0]}",
        },
        settings={
            "model": pipeline.name,
            "codes": f"{found.conditional.shape[1]}x{found.conditional.shape[2]} of "
            f"{pipeline.tokenizer.config.codebook_size}",
            "precision": str(pipeline.dtype).removeprefix("torch."),
        },
        warnings=[_ONLY_CODES],
        tables=tables,
        pictures=[_map_picture(found.map())],
    )


def _per_class(found: Likelihood, images: ImageSet) -> Table:
    assert images.labels is not None
    rows = []
    for label, name in enumerate(images.class_names):
        own = images.labels == label
        if own.any():
            with_class = float(found.conditional[own].mean(dtype=np.float64))
            without = float(found.unconditional[own].mean(dtype=np.float64))
            rows.append((name, int(own.sum()), with_class, without - with_class))
    return Table(
        title="Classes",
        columns=("class", "images", "bits per code", "saved by knowing the class"),
        rows=tuple(rows),
    )


def _map_picture(bits: np.ndarray) -> Picture:
    """Mean bits at each place of the grid, from white (few) to dark blue (many)."""
    low, high = float(bits.min()), float(bits.max())
    share = (bits - low) / max(high - low, 1e-9)
    few, many = np.array([255.0, 255.0, 255.0]), np.array([8.0, 48.0, 107.0])
    colours = (few + share[..., None] * (many - few)).round().astype(np.uint8)
    scale = max(1, _MAP_SIDE // bits.shape[1])
    image = Image.fromarray(colours).resize(
        (bits.shape[1] * scale, bits.shape[0] * scale), Image.Resampling.NEAREST
    )
    return Picture(
        title="Bits by place in the grid",
        image=image,
        note=f"White is {low:.2f} bits, dark blue {high:.2f}. Codes are drawn row by row: what "
        f"comes late can rest on more.",
    )
