"""Images through an image tokenizer and back, and what got lost on the way."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llamagen.backends.cpu.convolution import accelerate
from llamagen.data.views import center_crop
from llamagen.evaluation.image_sets import as_arrays
from llamagen.evaluation.metrics import SSIM_WINDOW, psnr, ssim
from llamagen.generation.memory import decoding_batch_size
from llamagen.models.tokenizer import ImageTokenizer, uint8_to_images
from llamagen.support.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """One image before and after."""

    path: Path
    original: Image.Image
    """Input of the tokenizer: cropped, RGB."""
    image: Image.Image
    psnr: float
    """In dB, between the two images' bytes."""
    ssim: float
    """Structural similarity with the true data range; NaN below 7 pixels a side."""
    ssim_published: float
    """As the published code computes it, with a data range of 2 for images in [0, 1]."""
    codes: np.ndarray
    """(rows, columns) int64."""


def prepare(
    image: Image.Image, *, downsampling: int, size: int | None = None, max_side: int | None = None
) -> Image.Image:
    """Crop an image so that its sides are multiples of ``downsampling``.

    Args:
        image: RGB.
        downsampling: the tokenizer's.
        size: crop the middle square to this side, as in the published evaluation. Without it the
            image loses at most ``downsampling - 1`` pixels a side.
        max_side: without ``size``, shrink the image until its long side is at most this.

    Raises:
        InputError: ``size`` is not a positive multiple of the downsampling, or the image is
            smaller than one code.
    """
    if size is not None:
        if size < 1 or size % downsampling:
            raise InputError(
                f"size {size} is not a positive multiple of the tokenizer's downsampling "
                f"{downsampling}; use {max(1, round(size / downsampling)) * downsampling}"
            )
        return center_crop(image, size)
    if max_side is not None and max(image.size) > max_side:
        image = image.copy()
        image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    width, height = (side // downsampling * downsampling for side in image.size)
    if min(width, height) == 0:
        raise InputError(
            f"an image of {image.width}x{image.height} pixels is smaller than one code of "
            f"{downsampling}x{downsampling}; give a size to enlarge it to"
        )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def reconstruct(
    tokenizer: ImageTokenizer, images: Iterable[tuple[Path, Image.Image]]
) -> Iterator[Reconstruction]:
    """Reconstruct prepared images, neighbours of the same size in one batch."""
    for (width, height), group in itertools.groupby(images, lambda pair: pair[1].size):
        limit = batch_limit(tokenizer, height, width)
        while batch := list(itertools.islice(group, limit)):
            before = np.stack([np.asarray(image) for _, image in batch])
            codes, decoded = encode_and_decode(tokenizer, before)
            after = as_arrays(decoded)
            measured = compare(before, after)
            for index, (path, image) in enumerate(batch):
                yield Reconstruction(
                    path=path,
                    original=image,
                    image=Image.fromarray(after[index]),
                    **{name: float(values[index]) for name, values in measured.items()},
                    codes=codes[index].cpu().numpy(),
                )


def batch_limit(tokenizer: ImageTokenizer, height: int, width: int) -> int:
    """Return how many images of a size fit into memory at once."""
    grid = tokenizer.config.grid_of(height, width)
    return decoding_batch_size(
        tokenizer.config, grid, device=tokenizer.device, dtype=tokenizer.dtype
    )


@torch.inference_mode()
def encode_and_decode(tokenizer: ImageTokenizer, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return codes (B, h, w) of bytes (B, H, W, 3), and their float32 images (B, 3, H, W)."""
    images = torch.from_numpy(pixels).movedim(-1, 1).to(tokenizer.device)
    codes = accelerate(tokenizer).encode(uint8_to_images(images))
    return codes, tokenizer.decode(codes).float()


def compare(before: np.ndarray, after: np.ndarray) -> dict[str, np.ndarray]:
    """Return PSNR and both kinds of SSIM of pairs of images (N, H, W, 3) uint8, each (N,).

    SSIM is NaN where a side is below 7 pixels.
    """
    similarity, published = np.full((2, len(before)), np.nan)
    if min(before.shape[1:3]) >= SSIM_WINDOW:
        similarity = ssim(before, after)
        published = ssim(before / 255.0, after / 255.0, data_range=2.0)
    return {"psnr": psnr(before, after), "ssim": similarity, "ssim_published": published}
