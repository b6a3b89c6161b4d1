"""Crops of an image: random ones to train on, fixed views to encode."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Literal

from PIL import Image, ImageOps

from llamagen.data.crops import TEN_CROP_RANGES, center_crop, five_crop, random_crop, ten_crop
from llamagen.support.errors import InputError

ViewKind = Literal["center", "flip", "five-crop", "ten-crop"]
"""The centre crop; that and its mirror image; the corners and the middle of larger images, five
views for each enlargement; or those and their mirror images, ten for each."""


def check_crop_ranges(ranges: tuple[float, ...]) -> None:
    """Check the enlargements that crops are cut from.

    Raises:
        InputError: there are none, or one is below 1.
    """
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
    """The image is enlarged up to this factor beyond what covers the crop; 1 never enlarges."""
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
    """Enlargements, relative to the size, that five or ten crops are cut from."""

    def __post_init__(self) -> None:
        check_crop_ranges(self.crop_ranges)
        if self.kind.endswith("-crop") and self.height != self.width:
            raise InputError(
                f"{self.kind} views are square, but the images are {self.width}x{self.height}; "
                f"use `views` flip"
            )

    def __len__(self) -> int:
        per_range = {"five-crop": 5, "ten-crop": 10}
        if self.kind in per_range:
            return per_range[self.kind] * len(self.crop_ranges)
        return 2 if self.kind == "flip" else 1

    def __call__(self, image: Image.Image) -> list[Image.Image]:
        """Return all views, always in the same order."""
        if self.kind.endswith("-crop"):
            crops = five_crop if self.kind == "five-crop" else ten_crop
            return [
                crop
                for crop_range in self.crop_ranges
                for crop in crops(image, self.height, crop_range)
            ]
        crop = center_crop(image, self.height, width=self.width)
        return [crop] if self.kind == "center" else [crop, ImageOps.mirror(crop)]

    def view(self, image: Image.Image, number: int) -> Image.Image:
        """Return one view; those before it are not made."""
        if not self.kind.endswith("-crop"):
            crop = center_crop(image, self.height, width=self.width)
            return ImageOps.mirror(crop) if number == 1 else crop
        each = len(self) // len(self.crop_ranges)
        one = dataclasses.replace(self, crop_ranges=(self.crop_ranges[number // each],))
        return one(image)[number % each]
