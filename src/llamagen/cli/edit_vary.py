"""Draw variations of an image: codes here and there are kept, the others drawn."""

from __future__ import annotations

import dataclasses

from llamagen.cli.editing import EditOptions, edit_image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(EditOptions):
    """Options of ``llamagen edit vary``."""

    keep: float = 0.5
    """Share of the codes that is kept, above 0 and below 1."""


def run(options: Options) -> None:
    """Edits and saves what ``options`` ask for."""
    edit_image(
        options,
        lambda editor, arguments: editor.vary(**arguments, keep=options.keep),
    )
