"""Results of the paper (arXiv 2406.06525), for comparison."""

from __future__ import annotations

from typing import NamedTuple


class ClassConditional(NamedTuple):
    """FID-50k on ImageNet 256x256, against ADM's training-set statistics."""

    model: str
    grid: int
    """Rows and columns of codes; images of 24x24 codes are resized from 384 to 256."""
    guidance_scale: float
    fid: float


CLASS_CONDITIONAL = (
    ClassConditional("B", 16, 2.0, 5.46),
    ClassConditional("B", 24, 2.0, 6.09),
    ClassConditional("L", 16, 2.0, 3.80),
    ClassConditional("L", 24, 2.0, 3.07),
    ClassConditional("XL", 24, 1.75, 2.62),
    ClassConditional("XXL", 24, 1.75, 2.34),
    ClassConditional("3B", 24, 1.65, 2.18),
)


class Reconstruction(NamedTuple):
    """rFID of ImageNet's 50,000 validation images, against those very images."""

    tokenizer: str
    size: int
    """Side in pixels of the reconstructions; they are compared at 256."""
    rfid: float
    psnr: float | None
    ssim: float | None
    """As published, with a data range of 2 for images in [0, 1]."""


RECONSTRUCTION = (
    Reconstruction("VQ-16", 256, 2.19, 20.79, 0.675),
    Reconstruction("VQ-16", 384, 0.94, None, None),
    Reconstruction("VQ-16", 512, 0.70, None, None),
    Reconstruction("VQ-8", 256, 0.59, None, None),
)

SAMPLES = 50_000
"""Images of the class-conditional protocol."""
TEXT_SAMPLES = 30_000
"""Captions of the text-conditional protocol: COCO's val2014."""
SIZE = 256
"""Side in pixels at which images are compared."""


def protocol_guidance(model: str) -> float | None:
    """Return the guidance scale of a published model's FID; None for other models."""
    for known in CLASS_CONDITIONAL:
        if model.lower() == f"c2i-{known.model}-{known.grid * 16}".lower():
            return known.guidance_scale
    return None
