"""Keep the upper part of an image and draw the rest."""

from __future__ import annotations

import dataclasses

from llamagen.cli.editing import EditOptions, edit_image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(EditOptions):
    """Options of ``llamagen edit complete``."""

    keep_rows: int | None = None
    """Rows of codes that are kept. Default: half of them."""


def run(options: Options) -> None:
    """Edits and saves what ``options`` ask for."""
    edit_image(
        options,
        lambda editor, arguments: editor.complete(**arguments, keep_rows=options.keep_rows),
    )
