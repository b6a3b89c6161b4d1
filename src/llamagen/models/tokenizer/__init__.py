"""The image tokenizer: an autoencoder between images and grids of codes."""

from llamagen.models.tokenizer.model import (
    ImageTokenizer,
    TokenizerOutput,
    images_to_uint8,
    uint8_to_images,
)
from llamagen.models.tokenizer.quantizers import Quantized, Quantizer

__all__ = [
    "ImageTokenizer",
    "Quantized",
    "Quantizer",
    "TokenizerOutput",
    "images_to_uint8",
    "uint8_to_images",
]
