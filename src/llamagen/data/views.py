"""Crops of images as of the published models: random ones to train on, fixed views to encode."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Literal

from PIL import Image, ImageOps

from llamagen.support.errors import InputError

TEN_CROP_RANGES = (1.1, 1.05)
"""Factors of the two ten-crops in the published code extraction (20 views per image)."""


def center_crop(image: Image.Image, size: int, *, width: int | None = None) -> Image.Image:
    """Resize the short side to ``size`` and crop the middle square, as ADM does.

    The image is halved with a box filter while its short side is at least twice ``size``, then
    scaled with a bicubic one (Dhariwal and Nichol 2105.05233, the crop behind ImageNet FIDs).

    A smaller image is enlarged. With a ``width``, the crop is ``size`` high and that wide.
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

    Published tokenizers were trained so. With a ``width``, the crop is ``size`` high and that wide.
    """
    width = width or size
    height = rng.randint(size, max(size, int(size * max_scale)))
    image = _cover(image, round(width * height / size), height)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - size)
    return image.crop((left, top, left + width, top + size))


def _cover(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize to cover ``width`` x ``height``, with the same aspect ratio."""
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


ViewKind = Literal["center", "flip", "five-crop", "ten-crop"]
"""The centre crop; that and its mirror image; the corners and the middle of larger images, five
views for each enlargement; or those and their mirror images, ten for each."""


def check_crop_ranges(ranges: tuple[float, ...]) -> None:
    """Raise InputError if there are no enlargements to cut crops from, or one is below 1."""
    if not ranges or not all(math.isfinite(each) and each >= 1 for each in ranges):
        raise InputError(
            f"crop_ranges are {ranges}, expected one or more finite numbers of at least 1"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crop and flip of a training image."""

    height: int
    width: int
    max_scale: float
    """Largest factor of enlargement beyond the size that covers the crop."""
    flip: bool
    """Mirror every other image."""

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """Return a crop, random by ``rng``."""
        image = random_crop(image, self.height, rng, width=self.width, max_scale=self.max_scale)
        return ImageOps.mirror(image) if self.flip and rng.random() < 0.5 else image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views:
    """The fixed views of an image, without any randomness."""

    height: int
    width: int
    kind: ViewKind = "center"
    crop_ranges: tuple[float, ...] = TEN_CROP_RANGES
    """Sizes, relative to the crop, of the images that five or ten crops are cut from."""

    def __post_init__(self) -> None:
        check_crop_ranges(self.crop_ranges)
        if self.kind.endswith("-crop") and self.height != self.width:
            raise InputError(
                f"{self.kind} views are square, but the images are {self.width}x{self.height}; "
                f"use `views` flip"
            )

    def __len__(self) -> int:
        ranges = len(self.crop_ranges)
        return {"center": 1, "flip": 2, "five-crop": 5 * ranges, "ten-crop": 10 * ranges}[self.kind]

    def __call__(self, image: Image.Image) -> list[Image.Image]:
        """Return all views, always in the same order."""
        if self.kind.endswith("-crop"):
            crops = five_crop if self.kind == "five-crop" else ten_crop
            return [crop for each in self.crop_ranges for crop in crops(image, self.height, each)]
        crop = center_crop(image, self.height, width=self.width)
        return [crop] if self.kind == "center" else [crop, ImageOps.mirror(crop)]

    def view(self, image: Image.Image, number: int) -> Image.Image:
        """Return one view, without making those of all enlargements."""
        if not self.kind.endswith("-crop"):
            return self(image)[number]
        chosen, within = divmod(number, len(self) // len(self.crop_ranges))
        return dataclasses.replace(self, crop_ranges=(self.crop_ranges[chosen],))(image)[within]
