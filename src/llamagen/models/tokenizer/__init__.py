"""The image tokenizer: a VQ autoencoder between images and grids of codes."""

from llamagen.models.tokenizer.model import (
    ImageTokenizer,
    TokenizerOutput,
    images_to_uint8,
    uint8_to_images,
)
from llamagen.models.tokenizer.quantizer import Quantized, QuantizerLosses, VectorQuantizer

__all__ = [
    "ImageTokenizer",
    "Quantized",
    "QuantizerLosses",
    "TokenizerOutput",
    "VectorQuantizer",
    "images_to_uint8",
    "uint8_to_images",
]
