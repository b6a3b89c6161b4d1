"""Extend an image downwards and to the right."""

from __future__ import annotations

import dataclasses

from llamagen.cli.editing import EditOptions, edit_image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(EditOptions):
    """Options of ``llamagen edit outpaint``."""

    below: int = 0
    """Rows of codes to draw below it."""
    right: int = 0
    """Columns of codes to draw on its right."""


def run(options: Options) -> None:
    """Edits and saves what ``options`` ask for."""
    edit_image(
        options,
        lambda editor, arguments: editor.outpaint(
            **arguments, below=options.below, right=options.right
        ),
    )
