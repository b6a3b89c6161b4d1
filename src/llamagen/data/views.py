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
    """Resize the short side to ``size`` and crop the middle square; enlarge a smaller image.

    As in ADM (Dhariwal and Nichol 2105.05233, the crop behind ImageNet FIDs), the image is halved
    with a box filter while its short side is at least twice ``size``, then scaled with a bicubic
    one. With a ``width``, the crop is ``size`` high and that wide.
    """
    width = width or size
    image = _cover(image, width, size)
    left, top = (image.width - width) // 2, (image.height - size) // 2
    return image.crop((left, top, left + width, top + size))


def corner_crops(
    image: Image.Image, size: int, crop_range: float, *, mirrored: bool
) -> list[Image.Image]:
    """Return five ``size`` squares of the centre crop at ``int(size * crop_range)``.

    Top left, top right, bottom left, bottom right, middle; if ``mirrored``, then the same of the
    mirrored image, which makes the published ten.
    """
    image = center_crop(image, int(size * crop_range))
    right, bottom = image.width - size, image.height - size
    middle = (round(right / 2), round(bottom / 2))
    corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), middle]
    sources = (image, ImageOps.mirror(image)) if mirrored else (image,)
    return [each.crop((x, y, x + size, y + size)) for each in sources for x, y in corners]


def _cover(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize to cover ``width`` x ``height``, with the same aspect ratio."""
    size = covering_size(image.size, width, height)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image.resize(size, Image.Resampling.BICUBIC)


def covering_size(size: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """Return the width and height that ``center_crop`` resizes an image to before it crops."""
    across, down = size
    while across >= 2 * width and down >= 2 * height:
        across, down = across // 2, down // 2
    scale = max(width / across, height / down)
    return max(width, round(across * scale)), max(height, round(down * scale))


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
    """Random crop and flip of a training image, as published tokenizers were trained."""

    height: int
    width: int
    max_scale: float
    """Largest factor of enlargement beyond the size that covers the crop."""
    flip: bool
    """Mirror every other image."""

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """Return a crop, random by ``rng``."""
        height = rng.randint(self.height, max(self.height, int(self.height * self.max_scale)))
        image = _cover(image, round(self.width * height / self.height), height)
        left = rng.randint(0, image.width - self.width)
        top = rng.randint(0, image.height - self.height)
        image = image.crop((left, top, left + self.width, top + self.height))
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
            mirrored = self.kind == "ten-crop"
            return [
                crop
                for each in self.crop_ranges
                for crop in corner_crops(image, self.height, each, mirrored=mirrored)
            ]
        crop = center_crop(image, self.height, width=self.width)
        return [crop] if self.kind == "center" else [crop, ImageOps.mirror(crop)]

    def view(self, image: Image.Image, number: int) -> Image.Image:
        """Return one view, without making those of all enlargements."""
        if not self.kind.endswith("-crop"):
            return self(image)[number]
        chosen, within = divmod(number, len(self) // len(self.crop_ranges))
        return dataclasses.replace(self, crop_ranges=(self.crop_ranges[chosen],))(image)[within]
