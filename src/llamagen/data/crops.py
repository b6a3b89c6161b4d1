"""Crops of PIL images: the ones the published models were trained and evaluated with."""

from __future__ import annotations

import random

from PIL import Image, ImageOps

TEN_CROP_RANGES = (1.1, 1.05)
"""Factors of the two ten-crops in the published code extraction (20 views per image)."""


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resizes the short side to ``size`` and crops the middle square, as ADM does.

    The image is halved with a box filter while its short side is at least twice ``size``, then
    scaled with a bicubic one (Dhariwal and Nichol 2105.05233, the crop behind ImageNet FIDs).
    """
    image = _short_side_to(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def ten_crop(image: Image.Image, size: int, crop_range: float) -> list[Image.Image]:
    """Ten ``size`` squares of the centre crop at ``int(size * crop_range)``.

    Top left, top right, bottom left, bottom right, middle; then the same of the mirrored image.
    """
    image = center_crop(image, int(size * crop_range))
    return [crop for view in (image, ImageOps.mirror(image)) for crop in _five_crop(view, size)]


def random_crop(
    image: Image.Image, size: int, rng: random.Random, *, max_scale: float = 1.25
) -> Image.Image:
    """A random ``size`` square after the short side is resized to ``size`` .. ``max_scale`` size.

    The tokenizer's training crop: the published range is from size / 1.0 to size / 0.8.
    """
    short = rng.randint(size, max(size, int(size * max_scale)))
    image = _short_side_to(image, short)
    left = rng.randint(0, image.width - size)
    top = rng.randint(0, image.height - size)
    return image.crop((left, top, left + size, top + size))


def _short_side_to(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _five_crop(image: Image.Image, size: int) -> list[Image.Image]:
    right, bottom = image.width - size, image.height - size
    middle = (round(right / 2), round(bottom / 2))
    corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), middle]
    return [image.crop((x, y, x + size, y + size)) for x, y in corners]
