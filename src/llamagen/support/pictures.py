"""Image files with metadata, and sheets of images."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

import llamagen.support.storage as storage
from llamagen.support.errors import InputError

METADATA_KEY = "llamagen"
"""PNG text chunk of an image's settings, as JSON."""

_BACKGROUND = (255, 255, 255)
_INK = (32, 32, 32)


def arrays_to_pil(pixels: np.ndarray) -> list[Image.Image]:
    """Return uint8 pixels (B, H, W, 3) as PIL images."""
    return [Image.fromarray(np.ascontiguousarray(image)) for image in pixels]


def image_grid(
    images: Sequence[Image.Image],
    *,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    scale: int = 1,
    gap: int = 2,
) -> Image.Image:
    """Arrange images of one size in rows.

    Args:
        images: at least one image.
        columns: images per row; by default about as many as rows.
        captions: a line of text under each image.
        scale: factor to enlarge images by, without interpolation.
        gap: pixels between images.
    """
    if not images:
        raise InputError("there are no images to lay out in a grid; give at least one")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    width, height = (side * scale for side in images[0].size)
    font = _font(width)
    line = 0 if captions is None else _line_height(font)
    rows = math.ceil(len(images) / columns)
    sheet = Image.new(
        "RGB",
        (columns * (width + gap) + gap, rows * (height + line + gap) + gap),
        _BACKGROUND,
    )
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        x = gap + index % columns * (width + gap)
        y = gap + index // columns * (height + line + gap)
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        if captions is not None:
            text = _fitted(captions[index], font, width)
            draw.text((x + width / 2, y + height), text, fill=_INK, font=font, anchor="ma")
    return sheet


def titled(image: Image.Image, title: str, *, size: int = 16) -> Image.Image:
    """Return ``image`` under a line of text."""
    font = ImageFont.load_default(size)
    line = _line_height(font) + 4
    width = max(image.width, math.ceil(font.getlength(title)) + 8)
    sheet = Image.new("RGB", (width, image.height + line), _BACKGROUND)
    ImageDraw.Draw(sheet).text((4, 2), title, fill=_INK, font=font)
    sheet.paste(image, (0, line))
    return sheet


def stacked(images: Sequence[Image.Image], *, gap: int = 8) -> Image.Image:
    """Arrange images in a column, left-aligned."""
    return _joined(images, gap, x_step=0, y_step=1)


def beside(images: Sequence[Image.Image], *, gap: int = 8) -> Image.Image:
    """Arrange images in a row, top-aligned."""
    return _joined(images, gap, x_step=1, y_step=0)


def _joined(images: Sequence[Image.Image], gap: int, x_step: int, y_step: int) -> Image.Image:
    corners, x, y = [], 0, 0
    for image in images:
        corners.append((x, y))
        x += x_step * (image.width + gap)
        y += y_step * (image.height + gap)
    width = max(x + image.width for (x, _), image in zip(corners, images, strict=True))
    height = max(y + image.height for (_, y), image in zip(corners, images, strict=True))
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    for corner, image in zip(corners, images, strict=True):
        sheet.paste(image, corner)
    return sheet


def save_png(
    image: Image.Image, path: Path | str, *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a PNG atomically, with ``metadata`` for ``read_metadata``."""
    with storage.atomic_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=_png_chunks(metadata))


def image_bytes(
    image: Image.Image,
    kind: Literal["png", "jpeg", "webp"],
    *,
    quality: int = 90,
    metadata: Mapping[str, Any] | None = None,
) -> bytes:
    """Return the content of an image file.

    Args:
        image: RGB.
        kind: file format.
        quality: 0 to 100, of JPEG and WebP; WebP is lossless at 100.
        metadata: see ``save_png``; PNG only.
    """
    file = io.BytesIO()
    if kind == "png":
        image.save(file, format="PNG", pnginfo=_png_chunks(metadata))
    elif kind == "jpeg":
        image.save(file, format="JPEG", quality=quality, subsampling=0)
    else:
        image.save(file, format="WEBP", quality=quality, lossless=quality == 100)
    return file.getvalue()


def _png_chunks(metadata: Mapping[str, Any] | None) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    if metadata is not None:
        chunks.add_itxt(METADATA_KEY, json.dumps(dict(metadata), ensure_ascii=False))
    return chunks


def read_metadata(path: Path | str) -> dict[str, Any]:
    """Return the metadata that ``save_png`` wrote.

    Raises:
        FileNotFoundError: no such file.
        InputError: the file is no image, or has no metadata.
    """
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(METADATA_KEY)
    except (OSError, SyntaxError) as error:
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{path} does not exist") from error
        raise InputError(f"{path} is not a readable image ({error})") from error
    if text is None:
        raise InputError(f"{path} does not say how it was made; only PNGs of llamagen generate do")
    values: dict[str, Any] = json.loads(text)
    return values


def _font(width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(10, min(16, width // 8)))


def _line_height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return math.ceil(font.getbbox("Ag")[3]) + 4


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
