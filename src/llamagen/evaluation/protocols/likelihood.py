"""Likelihood of held-out images: bits per code and per pixel.

Shapes: N images, B images of a batch.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import llamagen.support.storage as storage
from llamagen.evaluation.image_sets import ImageSet, Pieces, in_batches, size_text
from llamagen.evaluation.protocols.tokenizer import batch_limit
from llamagen.evaluation.report import Picture, Report, Table
from llamagen.evaluation.samples import model_size
from llamagen.generation.likelihood import code_log_likelihoods
from llamagen.models.tokenizer import uint8_to_images
from llamagen.pipeline import Pipeline
from llamagen.support.devices import dtype_name
from llamagen.support.errors import InputError

_ONLY_CODES = (
    "the bits are those of the codes: what the image tokenizer lost is not counted, so models with "
    "different tokenizers cannot be compared"
)
_MAP_SIDE = 320
"""Approximate side in pixels of the map."""


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Bits of the codes of a set of images."""

    conditional: np.ndarray
    """(N, rows, columns) float32, given class or caption and the codes before."""
    unconditional: np.ndarray
    """The same without class or caption."""
    pixels: int
    """Of an image."""

    @property
    def bits_per_code(self) -> float:
        """Mean over all codes."""
        return float(self.conditional.mean(dtype=np.float64))

    @property
    def bits_per_code_unconditional(self) -> float:
        """Mean over all codes, without class or caption."""
        return float(self.unconditional.mean(dtype=np.float64))

    @property
    def bits_per_pixel(self) -> float:
        """Bits of the codes over the pixels: what the tokenizer lost is not counted."""
        return self.bits_per_code * math.prod(self.conditional.shape[1:]) / self.pixels

    def map(self) -> np.ndarray:
        """Return mean bits (rows, columns) at each position of the grid."""
        return self.conditional.mean(0, dtype=np.float64)


def evaluate_likelihood(pipeline: Pipeline, images: ImageSet, out: Path) -> Report:
    """Measure bits per code and per pixel; see ``measure_likelihood``."""
    found = measure_likelihood(pipeline, images, out)
    rows, columns = found.conditional.shape[1:]
    random = pipeline.transformer.config.order == "random"
    names = ("bits_per_code", "bits_per_code_unconditional", "bits_per_pixel")
    return Report(
        protocol="likelihood",
        title=f"{pipeline.name} on {images.name}",
        metrics={name: getattr(found, name) for name in names},
        reference={"source": "none: likelihood needs no other images"},
        samples={"source": images.name, "images": len(images), "size": size_text(images.size)},
        settings={
            "model": pipeline.name,
            "codes": f"{rows}x{columns} of {pipeline.tokenizer.config.codebook_size}",
            "precision": dtype_name(pipeline.dtype),
            **({"order": "a random one, the same for all images"} if random else {}),
        },
        warnings=[_ONLY_CODES],
        tables=[] if images.labels is None else [_classes_table(found, images)],
        pictures=[_map_picture(found.map(), "in a random order" if random else "row by row")],
    )


def measure_likelihood(pipeline: Pipeline, images: ImageSet, root: Path) -> Likelihood:
    """Return the bits of all images; called in every process of a run, which share the work.

    Results of the same images and model that are in a folder in ``root`` are only read. InputError
    if images and model differ in size, or in classes or captions.
    """
    if images.size != model_size(pipeline):
        raise InputError(
            f"images of {images.name} have {size_text(images.size)} pixels, but {pipeline.name} "
            f"draws {size_text(model_size(pipeline))}; crop them with size"
        )
    conditions, tokenizer = _conditions(pipeline, images), pipeline.tokenizer

    @torch.inference_mode()
    def bits(pixels: Tensor, items: range) -> dict[str, np.ndarray]:
        codes = tokenizer.encode(uint8_to_images(pixels.to(tokenizer.device)))
        own = pipeline.conditions(conditions[items.start : items.stop])
        given = [each.condition for each in own]
        found = {}
        for name in ("conditional", "unconditional"):
            is_given = name == "conditional"
            nats = code_log_likelihoods(pipeline.transformer, codes, given, conditional=is_given)
            found[name] = (-nats / math.log(2)).cpu().numpy()
        return found

    settings = {
        "weights": pipeline.fingerprints(),
        "images": images.identity,
        "conditions": storage.short_digest([json.dumps(conditions).encode()]),
        **pipeline.precision,
    }
    pieces = Pieces.named(root, "likelihood", settings, len(images))
    pieces.compute(in_batches(images, batch_limit(tokenizer, *images.size), bits), "likelihood")
    conditional, unconditional = pieces.rows("conditional"), pieces.rows("unconditional")
    return Likelihood(conditional, unconditional, math.prod(images.size))


def _conditions(pipeline: Pipeline, images: ImageSet) -> list[str | int]:
    """Class or caption of every image."""
    if pipeline.labels is not None:
        if images.labels is None:
            raise InputError(
                f"{images.name} has no classes, but {pipeline.name} draws them; use class folders"
            )
        names = [images.class_names[label] for label in images.labels]
        classes = pipeline.labels.match_all(names, images.name, f"the images of {pipeline.name}")
        return [classes[name] for name in names]
    if images.captions is None or not all(images.captions):
        raise InputError(
            f"not every image of {images.name} has a caption, but {pipeline.name} draws captions; "
            f"add a table with the column text"
        )
    return list(images.captions)


def _classes_table(found: Likelihood, images: ImageSet) -> Table:
    rows = []
    for label, name in enumerate(images.class_names):
        own = images.labels == label
        if np.any(own):
            part = Likelihood(found.conditional[own], found.unconditional[own], found.pixels)
            saved = part.bits_per_code_unconditional - part.bits_per_code
            rows.append((name, len(part.conditional), part.bits_per_code, saved))
    columns = ("class", "images", "bits per code", "saved by knowing the class")
    return Table(title="Classes", columns=columns, rows=tuple(rows))


def _map_picture(bits: np.ndarray, order: str) -> Picture:
    """Mean bits at each position of the grid, from white (minimum) to dark blue (maximum)."""
    low, high = float(bits.min()), float(bits.max())
    share = (bits - low) / max(high - low, 1e-9)
    white, blue = 255.0, np.array([8.0, 48.0, 107.0])
    colours = (white + share[..., None] * (blue - white)).round().astype(np.uint8)
    image, scale = Image.fromarray(colours), max(1, _MAP_SIDE // bits.shape[1])
    return Picture(
        title="Bits by position in the grid",
        image=image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST),
        note=f"White is {low:.2f} bits, dark blue {high:.2f}. Codes are predicted {order}, so "
        f"later ones have more context.",
    )
