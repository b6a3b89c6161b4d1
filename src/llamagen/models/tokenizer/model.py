"""The image tokenizer: images to a grid of codes and back (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llamagen.config import TokenizerConfig
from llamagen.models.pretrained import PretrainedModel, eval_mode
from llamagen.models.tokenizer.autoencoder import Decoder, Encoder
from llamagen.models.tokenizer.layers import Conv2d, Conv3x3, NormSiLU, TorchOperations, per_image
from llamagen.models.tokenizer.quantizers import Quantized, new_quantizer
from llamagen.support.errors import InputError

_LARGE_MAP = 2**21
"""Numbers in a feature map. From here on maps do not fit into caches, and a CPU takes no longer for
one image at a time than for a batch.
"""


class TokenizerOutput(NamedTuple):
    """Result of a forward pass in training."""

    reconstruction: Tensor
    """(B, 3, H, W) images, about in [-1, 1]."""
    quantized: Quantized


class ImageTokenizer(PretrainedModel[TokenizerConfig]):
    """Autoencoder around a quantiser. Its state-dict keys are those of the public checkpoints."""

    config_class = TokenizerConfig
    kind = "image tokenizer"

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = new_quantizer(config)
        self.quant_conv = Conv2d(config.z_channels, self.quantize.dim, 1)
        self.post_quant_conv = Conv2d(self.quantize.dim, config.z_channels, 1)

    def set_operations(self, operations: TorchOperations) -> None:
        """Let ``operations`` compute the layers from now on, in place of torch."""
        for module in self.modules():
            if isinstance(module, Conv3x3 | NormSiLU):
                module.operations = operations

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Reconstruct ``images`` (B, 3, H, W) in [-1, 1], with the straight-through gradient."""
        quantized = self.quantize(self.encode_latents(images))
        vectors, latents, _ = quantized
        straight_through = latents + (vectors - latents).detach()
        return TokenizerOutput(self.decode_latents(straight_through), quantized)

    def encode_latents(self, images: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in [-1, 1] as latents before quantisation (B, E, h, w).

        Raises InputError if a side of the images is not a multiple of the downsampling.
        """
        self.config.grid_of(images.shape[-2], images.shape[-1])
        pixels = images.shape[-2] * images.shape[-1]
        return self._compute(lambda x: self.quant_conv(self.encoder(x)), images, pixels)

    def decode_latents(self, vectors: Tensor) -> Tensor:
        """Decode latents of codes (B, E, h, w) to images (B, 3, H, W), about in [-1, 1]."""
        pixels = vectors.shape[-2] * vectors.shape[-1] * self.config.downsampling**2
        return self._compute(lambda x: self.decoder(self.post_quant_conv(x)), vectors, pixels)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to codes (B, H / f, W / f), f the downsampling.

        Raises InputError if a side of the images is not a multiple of it.
        """
        with eval_mode(self):
            codes: Tensor = self.quantize(self.encode_latents(images)).codes
            return codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes (B, h, w) to images (B, 3, h * f, w * f), about in [-1, 1] but not clamped.

        Codes may lie on the CPU whatever the device: then nothing waits for the device. Raises
        InputError if a code lies outside the codebook.
        """
        size = self.config.codebook_size
        low, high = map(int, codes.aminmax()) if codes.numel() else (0, 0)
        if low < 0 or high >= size:
            raise InputError(
                f"codes run from {low} to {high}, but this tokenizer has "
                f"{size} codes (0 to {size - 1}); use the tokenizer that made them"
            )
        with eval_mode(self):
            return self.decode_latents(self.quantize.lookup(codes.to(self.device)))

    def _compute(self, function: Callable[[Tensor], Tensor], x: Tensor, pixels: int) -> Tensor:
        """Return ``function(x)``; image by image only for speed and memory's sake."""
        x = self._laid_out(x)
        large = pixels * self.config.base_channels >= _LARGE_MAP
        return per_image(function, x) if large else function(x)

    def _laid_out(self, x: Tensor) -> Tensor:
        """In the weights' dtype and channels last, which oneDNN and cuDNN convolve faster."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.quant_conv.weight.dtype)
        return x.contiguous(memory_format=torch.channels_last)


def images_to_uint8(images: Tensor) -> Tensor:
    """Convert images (..., 3, H, W) in [-1, 1] to bytes, truncated as in the paper's evaluation."""
    return (127.5 * images.float() + 128.0).clamp_(0, 255).to(torch.uint8)


def uint8_to_images(pixels: Tensor) -> Tensor:
    """Convert bytes (..., 3, H, W) to float32 images in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0
