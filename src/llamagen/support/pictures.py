"""Image files with metadata, and sheets of images."""

from __future__ import annotations

import io
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

import llamagen.support.storage as storage
from llamagen.support.errors import InputError
from llamagen.support.values import plain, require_integer

METADATA_KEY = "llamagen"
"""PNG text chunk of an image's settings, as JSON."""
DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
"""Raised by Pillow's decoders on damaged files."""

KINDS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
"""Suffix of an image file -> its format, of those that can be written."""

_DESCRIPTION = 0x010E
"""EXIF tag that has the settings of a JPEG or WebP file."""
_MAX_EXIF = 60_000
"""Bytes of text; JPEG has room for hardly more."""

_INK = (32, 32, 32)

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def arrays_to_pil(pixels: np.ndarray) -> list[Image.Image]:
    """Return uint8 pixels (B, H, W, 3) as PIL images."""
    return [Image.fromarray(image) for image in pixels]


def image_grid(
    images: Sequence[Image.Image],
    *,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    scale: int | None = 1,
    gap: int = 2,
) -> Image.Image:
    """Arrange images of one size, at least one, in rows; by default about as many as columns.

    ``captions`` are lines of text below the images, ``gap`` is in pixels. ``scale`` enlarges the
    images by a factor, without interpolation; None makes small ones about 64 pixels wide.
    """
    if not images:
        raise InputError("there are no images to lay out in a grid; give at least one")
    if scale is None:
        scale = max(1, 64 // images[0].width)
    if columns is None:
        columns = math.ceil(math.sqrt(len(images)))
    columns = min(require_integer("columns", columns, 1), len(images))
    width, height = (side * scale for side in images[0].size)
    font = ImageFont.load_default(max(10, min(16, width // 8)))
    line = 0 if captions is None else _line_height(font)
    across, down = width + gap, height + line + gap
    sheet = _blank(columns * across + gap, math.ceil(len(images) / columns) * down + gap)
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        x, y = gap + index % columns * across, gap + index // columns * down
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        if captions is not None:
            text = _fitted(captions[index], font, width)
            draw.text((x + width / 2, y + height), text, fill=_INK, font=font, anchor="ma")
    return sheet


def titled(image: Image.Image, title: str, *, size: int = 16) -> Image.Image:
    """Return ``image`` under a line of text."""
    font = ImageFont.load_default(size)
    line = _line_height(font) + 4
    sheet = _blank(max(image.width, math.ceil(font.getlength(title)) + 8), image.height + line)
    ImageDraw.Draw(sheet).text((4, 2), title, fill=_INK, font=font)
    sheet.paste(image, (0, line))
    return sheet


def stacked(images: Sequence[Image.Image], *, gap: int = 8, across: bool = False) -> Image.Image:
    """Arrange images in a column, left-aligned, or across in a row, top-aligned."""
    sizes = np.array([image.size for image in images])
    steps = (sizes + gap) * ((1, 0) if across else (0, 1))
    corners = steps.cumsum(0) - steps
    sheet = _blank(*(corners + sizes).max(0).tolist())
    for image, (x, y) in zip(images, corners.tolist(), strict=True):
        sheet.paste(image, (x, y))
    return sheet


def save_png(
    image: Image.Image, path: Path | str, *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a PNG atomically, with ``metadata`` for ``read_metadata``."""
    storage.write_bytes(path, image_bytes(image, "png", metadata=metadata))


def image_bytes(
    image: Image.Image,
    kind: Literal["png", "jpeg", "webp"],
    *,
    quality: int = 90,
    metadata: Mapping[str, Any] | None = None,
) -> bytes:
    """Return the content of an image file; for ``metadata`` see ``save_png``.

    ``quality`` is of JPEG and WebP, from 0 to 100, where WebP is lossless. JPEG leaves out metadata
    that are longer than its headers may be.
    """
    chunks, exif = PngImagePlugin.PngInfo(), Image.Exif()
    if metadata is not None:
        text = json.dumps(dict(metadata), ensure_ascii=False, default=plain)
        # Undecodable bytes of names become escapes of JSON.
        chunks.add_itxt(METADATA_KEY, text.encode("utf-8", "backslashreplace").decode())
        described = json.dumps({METADATA_KEY: dict(metadata)}, default=plain)
        if len(described) <= _MAX_EXIF:
            exif[_DESCRIPTION] = described
    options: dict[str, dict[str, Any]] = {
        "png": {"pnginfo": chunks},
        "jpeg": {"quality": quality, "subsampling": 0, "exif": exif},
        "webp": {"quality": quality, "lossless": quality == 100, "exif": exif},
    }
    file = io.BytesIO()
    image.save(file, format=kind, **options[kind])
    return file.getvalue()


def read_metadata(path: Path | str) -> dict[str, Any]:
    """Return the metadata that ``image_bytes`` wrote; InputError if the file has none."""
    try:
        with Image.open(path) as image:
            # Those of a PNG before its pixels are there at once; "text" reads all of the file.
            text = image.info.get(METADATA_KEY) or getattr(image, "text", {}).get(METADATA_KEY)
            described = "" if text else str(image.getexif().get(_DESCRIPTION, ""))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist") from error
    except DECODING_ERRORS as error:
        raise InputError(f"{path} is not a readable image ({error})") from error
    try:
        values: dict[str, Any] = json.loads(text or described)
        return values if text else values[METADATA_KEY]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} does not say how it was made; only files of llamagen generate do"
        ) from error


def _blank(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), "white")


def _line_height(font: _Font) -> int:
    return math.ceil(font.getbbox("Ag")[3]) + 4


def _fitted(text: str, font: _Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
