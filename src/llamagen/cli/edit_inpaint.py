"""Draw a marked part of an image anew."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from llamagen.cli.editing import EditOptions, edit_image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(EditOptions):
    """Options of ``llamagen edit inpaint``."""

    mask: Path
    """An image of the same size, white where to draw; or, if any of it is transparent, transparent
    there."""
    keep_pixels: bool = True
    """Leave what is not marked as it is, instead of what codes make of it."""
    best_of: int = 4
    """Candidates for each image, of which the best is kept: the others may go on badly below."""


def run(options: Options) -> None:
    """Edits and saves what ``options`` ask for."""
    edit_image(
        options,
        lambda editor, arguments: editor.inpaint(
            **arguments, mask=options.mask, keep_pixels=options.keep_pixels
        ),
    )
