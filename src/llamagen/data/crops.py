"""Crops of PIL images: the ones the published models were trained and evaluated with."""

from __future__ import annotations

import random

from PIL import Image, ImageOps

TEN_CROP_RANGES = (1.1, 1.05)
"""Factors of the two ten-crops in the published code extraction (20 views per image)."""


def center_crop(image: Image.Image, size: int, *, width: int | None = None) -> Image.Image:
    """Resize the short side to ``size`` and crop the middle square, as ADM does.

    The image is halved with a box filter while its short side is at least twice ``size``, then
    scaled with a bicubic one (Dhariwal and Nichol 2105.05233, the crop behind ImageNet FIDs).

    Args:
        image: of any size; a smaller one is enlarged.
        size: side of the square.
        width: for a crop that is no square, its width; ``size`` is then its height.
    """
    width = width or size
    image = _cover(image, width, size)
    left, top = (image.width - width) // 2, (image.height - size) // 2
    return image.crop((left, top, left + width, top + size))


def ten_crop(image: Image.Image, size: int, crop_range: float) -> list[Image.Image]:
    """Return ten ``size`` squares of the centre crop at ``int(size * crop_range)``.

    Those of ``five_crop``, then the same of the mirrored image.
    """
    image = center_crop(image, int(size * crop_range))
    return [crop for view in (image, ImageOps.mirror(image)) for crop in _five_crop(view, size)]


def five_crop(image: Image.Image, size: int, crop_range: float) -> list[Image.Image]:
    """Return five ``size`` squares of the centre crop at ``int(size * crop_range)``.

    Top left, top right, bottom left, bottom right, middle.
    """
    return _five_crop(center_crop(image, int(size * crop_range)), size)


def random_crop(
    image: Image.Image,
    size: int,
    rng: random.Random,
    *,
    width: int | None = None,
    max_scale: float = 1.25,
) -> Image.Image:
    """Return a random square after the short side is resized to ``size`` .. ``max_scale`` size.

    The tokenizer's training crop: the published range is from size / 1.0 to size / 0.8. With a
    ``width``, the crop is ``size`` high and that wide.
    """
    width = width or size
    height = rng.randint(size, max(size, int(size * max_scale)))
    image = _cover(image, round(width * height / size), height)
    left = rng.randint(0, image.width - width)
    top = rng.randint(0, image.height - size)
    return image.crop((left, top, left + width, top + size))


def _cover(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize to the smallest size of the same shape that covers ``width`` x ``height``."""
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def _five_crop(image: Image.Image, size: int) -> list[Image.Image]:
    right, bottom = image.width - size, image.height - size
    middle = (round(right / 2), round(bottom / 2))
    corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), middle]
    return [image.crop((x, y, x + size, y + size)) for x, y in corners]
