"""Images that a command has made, as files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamagen.support.errors import InputError

if TYPE_CHECKING:
    from llamagen.pipeline import PipelineOutput

_STEM_LENGTH = 50
"""Letters of a prompt that a file is named by."""


def require_place(out: Path) -> None:
    """Checks that images can be written to a folder, or to a .png file, before any is drawn.

    Raises:
        InputError: it is a file of another kind.
        OSError: it cannot be written to.
    """
    import llamagen.support.storage as storage

    is_file = out.suffix.lower() == ".png"
    if not is_file and out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give --out a folder or a name that ends in .png")
    storage.require_writable(out.parent if is_file else out)


def save_images(output: PipelineOutput, out: Path, *, columns: int | None = None) -> list[Path]:
    """Writes images into a folder, with a sheet if they are several, or the sheet alone.

    Args:
        output: the images.
        out: the folder, or the .png file of the sheet.
        columns: of the sheet.

    Returns:
        The files.
    """
    from llamagen.support.pictures import image_grid, save_png

    paths = []
    sheet_only = out.suffix.lower() == ".png"
    if not sheet_only:
        for image, metadata in zip(output.images, output.metadata, strict=True):
            path = out / f"{_file_stem(metadata)}.png"
            save_png(image, path, metadata=metadata)
            paths.append(path)
    if sheet_only or len(output.images) > 1:
        path = out if sheet_only else out / "sheet.png"
        alone = len(output.images) == 1
        sheet = output.images[0] if alone else image_grid(output.images, columns=columns)
        save_png(sheet, path, metadata=output.metadata[0] if alone else None)
        paths.append(path)
    return paths


def _file_stem(metadata: dict[str, Any]) -> str:
    text = str(metadata.get("class", metadata.get("prompt", "image")))
    name = re.sub(r"[^\w]+", "-", text).strip("-").lower()
    # File names of 255 bytes are the longest almost anywhere, of which a letter may take four.
    return f"{name[:_STEM_LENGTH].strip('-') or 'image'}-{metadata['seed']}"
