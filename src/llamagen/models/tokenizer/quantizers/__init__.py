"""Quantisers: latents to codes and back. Each is one file here, and its row in ``config``.

Shapes: B images, E channels of a latent, h x w grid.
"""

from __future__ import annotations

import abc
import importlib
from typing import NamedTuple

from torch import Tensor, nn

from llamagen.config import QUANTIZERS, TokenizerConfig
from llamagen.support.errors import InputError


class Quantized(NamedTuple):
    """Latents and their codes."""

    vectors: Tensor
    """(B, E, h, w) latents of the codes, before the straight-through gradient."""
    latents: Tensor
    """(B, E, h, w) latents as they were compared (normalised if the codebook is)."""
    codes: Tensor
    """(B, h, w) int64 codes, below ``codebook_size``."""


class Quantizer(nn.Module, abc.ABC):
    """Built from a ``TokenizerConfig``, whose ``codebook_size`` is the number of codes."""

    dim: int
    """E, channels of a latent."""

    @abc.abstractmethod
    def forward(self, latents: Tensor) -> Quantized:
        """Quantise ``latents`` (B, E, h, w), in float32 whatever autocast says."""

    @abc.abstractmethod
    def compared(self, latents: Tensor) -> Tensor:
        """Return latents (B, E, h, w) as ``forward`` compares them, in float32."""

    @abc.abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """Return the latents (B, E, h, w) of codes (B, h, w), in the weights' precision."""

    @abc.abstractmethod
    def losses(self, quantized: Quantized, *, entropy: bool = False) -> dict[str, Tensor]:
        """Return scalar losses of a batch, unweighted, in float32.

        Any of "codebook", which moves the codes to the latents; "commitment", which moves the
        latents to the codes; and, if ``entropy``, "entropy": low where assignments are confident
        and use all codes.
        """

    def replace_codes(self, codes: Tensor, latents: Tensor) -> None:
        """Move ``codes`` (N,) to ``latents`` (N, E), as they are compared, if they can be moved."""
        del codes, latents
        raise InputError("this quantizer has no trained codebook; its codes cannot be moved")


def new_quantizer(config: TokenizerConfig) -> Quantizer:
    """Return the untrained quantiser that ``config`` names."""
    module = importlib.import_module(f"{__name__}.{config.quantizer}")
    quantizer: Quantizer = getattr(module, QUANTIZERS[config.quantizer])(config)
    return quantizer
