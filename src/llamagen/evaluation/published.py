"""Results of the paper (arXiv 2406.06525), for comparison."""

CLASS_CONDITIONAL = (
    ("B", 16, 2.0, 5.46),
    ("B", 24, 2.0, 6.09),
    ("L", 16, 2.0, 3.80),
    ("L", 24, 2.0, 3.07),
    ("XL", 24, 1.75, 2.62),
    ("XXL", 24, 1.75, 2.34),
    ("3B", 24, 1.65, 2.18),
)
"""Model, rows and columns of codes, guidance scale, FID-50k on ImageNet 256x256 against ADM's
training-set statistics. Images of 24x24 codes are resized from 384 to 256."""

RECONSTRUCTION = (
    ("VQ-16", 256, 2.19, 20.79, 0.675),
    ("VQ-16", 384, 0.94, None, None),
    ("VQ-16", 512, 0.70, None, None),
    ("VQ-8", 256, 0.59, None, None),
)
"""Tokenizer, side in pixels of the reconstructions (they are compared at 256), rFID of ImageNet's
50,000 validation images against those very images, PSNR, and SSIM as published: with a data range
of 2 for images in [0, 1]."""

SAMPLES = 50_000
"""Images of the class-conditional protocol."""
TEXT_SAMPLES = 30_000
"""Captions of the text-conditional protocol: COCO's val2014."""
VALIDATION_IMAGES = 50_000
"""Images of the tokenizer protocol: ImageNet's validation images."""
SIZE = 256
"""Side in pixels at which images are compared."""


def protocol_guidance(model: str) -> float | None:
    """Return the guidance scale of a published model's FID; None for other models."""
    scales = {
        f"c2i-{name}-{16 * grid}".lower(): scale for name, grid, scale, _ in CLASS_CONDITIONAL
    }
    return scales.get(model.lower())
