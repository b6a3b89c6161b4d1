"""Quantisers: latents to codes and back. Each is one file here, and its row in ``config``.

Shapes: B images, E channels of a latent, h x w grid.
"""

from __future__ import annotations

import importlib

from llamagen.config import QUANTIZERS, TokenizerConfig
from llamagen.models.tokenizer.quantizers.base import Quantized, Quantizer

__all__ = ["Quantized", "Quantizer", "new_quantizer"]


def new_quantizer(config: TokenizerConfig) -> Quantizer:
    """Return the untrained quantiser that ``config`` names."""
    module = importlib.import_module(f"{__name__}.{config.quantizer}")
    quantizer: Quantizer = getattr(module, QUANTIZERS[config.quantizer])(config)
    return quantizer
