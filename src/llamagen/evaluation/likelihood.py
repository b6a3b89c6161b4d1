"""How likely a model finds images: bits per code and per pixel.

Shapes: N images, B images of a batch, T codes of an image.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llamagen.evaluation.image_sets import ImageSet
from llamagen.evaluation.pieces import Pieces
from llamagen.generation.likelihood import code_log_likelihoods
from llamagen.generation.memory import decoding_batch_size
from llamagen.models.tokenizer import uint8_to_images
from llamagen.pipeline import Pipeline
from llamagen.support.errors import InputError


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Of a set of images."""

    conditional: np.ndarray
    """(N, rows, columns) float32 bits of each code, given class or caption and the codes before."""
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
        """Of the codes, not of the pixels themselves: what the tokenizer lost is not in it."""
        return self.bits_per_code * math.prod(self.conditional.shape[1:]) / self.pixels

    def map(self) -> np.ndarray:
        """(rows, columns) mean bits at each place of the grid."""
        result: np.ndarray = self.conditional.mean(0, dtype=np.float64)
        return result


def measure_likelihood(pipeline: Pipeline, images: ImageSet, root: Path) -> Likelihood:
    """Bits of all images; to be called in every process of a run, which share the work.

    What was computed before, of the same images by the same model, is only read.

    Args:
        pipeline: tokenizer and transformer.
        images: with the model's classes, or with captions; as large as the model's images.
        root: gets a folder for this model and these images.

    Raises:
        InputError: images and model do not fit together.
        OSError: the disk is full.
    """
    grid = pipeline.tokenizer.config.grid_of(*images.size)
    if grid != pipeline.transformer.config.grid:
        rows, columns = pipeline.transformer.config.grid
        side = pipeline.tokenizer.config.downsampling
        raise InputError(
            f"images of {images.name} have {images.size[1]}x{images.size[0]} pixels, but "
            f"{pipeline.name} draws {columns * side}x{rows * side}; give --size"
        )
    conditions = _conditions(pipeline, images)

    def measure(first: int, last: int, advance: Callable[[int], object]) -> dict[str, np.ndarray]:
        return _bits_of_piece(pipeline, images.read(first, last), conditions[first:last], advance)

    pieces = Pieces(_folder(root, pipeline, images), len(images))
    pieces.make(measure, "likelihood")
    return Likelihood(
        pieces.rows("conditional"), pieces.rows("unconditional"), math.prod(images.size)
    )


def _folder(root: Path, pipeline: Pipeline, images: ImageSet) -> Path:
    """Where in ``root`` these numbers belong: another model or other images go elsewhere."""
    weights = [pipeline.transformer.fingerprint(), pipeline.tokenizer.fingerprint()]
    whole = hashlib.sha256(f"{weights} {images.identity} {pipeline.dtype}".encode()).hexdigest()
    return root / f"likelihood-{whole[:16]}"


def _conditions(pipeline: Pipeline, images: ImageSet) -> list[str | int]:
    """Class or caption of every image."""
    if pipeline.labels is not None:
        if images.labels is None:
            raise InputError(
                f"{images.name} has no classes, but {pipeline.name} draws them; use class folders"
            )
        classes = [pipeline.labels.find(name) for name in images.class_names]
        return [classes[label] for label in images.labels]
    if images.captions is None or not all(images.captions):
        raise InputError(
            f"not every image of {images.name} has a caption, but {pipeline.name} draws captions; "
            f"add a table with the column text"
        )
    return list(images.captions)


@torch.inference_mode()
def _bits_of_piece(
    pipeline: Pipeline,
    pixels: np.ndarray,
    conditions: list[str | int],
    advance: Callable[[int], object],
) -> dict[str, np.ndarray]:
    """(images, rows, columns) float32: with the condition, and without."""
    config = pipeline.transformer.config
    size = decoding_batch_size(
        pipeline.tokenizer.config, config.grid, device=pipeline.device, dtype=pipeline.dtype
    )
    found: dict[str, list[Tensor]] = {"conditional": [], "unconditional": []}
    for first in range(0, len(pixels), size):
        images = torch.from_numpy(np.array(pixels[first : first + size])).movedim(-1, 1)
        images = uint8_to_images(images.to(pipeline.device)).to(pipeline.tokenizer.dtype)
        codes = pipeline.tokenizer.encode(images)
        given = pipeline.conditions(conditions[first : first + size])
        for name, conditional in (("conditional", True), ("unconditional", False)):
            nats = code_log_likelihoods(
                pipeline.transformer,
                codes,
                [each.condition for each in given],
                conditional=conditional,
            )
            found[name].append(-nats / math.log(2))
        advance(len(images))
    return {name: torch.cat(parts).cpu().numpy() for name, parts in found.items()}
