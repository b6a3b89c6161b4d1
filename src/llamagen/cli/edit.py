"""Edit an image: complete it, redraw a part of it, extend it, vary it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from llamagen.cli.options import CHOICES, ImageOptions, given_settings
from llamagen.support.errors import InputError

if TYPE_CHECKING:
    from llamagen.pipeline import PipelineOutput
    from llamagen.pipeline.editing import Editor


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditOptions(ImageOptions):
    """Options of all commands that edit an image."""

    image: tyro.conf.Positional[Path]
    """The image. It is resized so that its short side is the model's, and its middle cut out."""
    model: str
    """Name (emoji, cifar10, c2i-L-384), pipeline folder or hub repository."""

    def edit(self, editor: Editor, arguments: dict[str, Any]) -> PipelineOutput:
        """Edit with the ``arguments`` that all edits have, and this one's own."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Complete(EditOptions):
    """Keep the upper part of an image and draw the rest."""

    keep_rows: int | None = None
    """Rows of codes that are kept. Default: half of them."""

    def edit(self, editor: Editor, arguments: dict[str, Any]) -> PipelineOutput:
        """See ``EditOptions``."""
        return editor.complete(**arguments, keep_rows=self.keep_rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inpaint(EditOptions):
    """Draw a marked part of an image anew."""

    mask: Path
    """An image of the same size, white where to draw; or, if any of it is transparent, transparent
    there."""
    keep_pixels: bool = True
    """Leave what is not marked as it is, instead of what codes make of it."""
    best_of: int = 4
    """Candidates for each image, of which the best is returned: the others may not fit what is
    below the marked part."""

    def edit(self, editor: Editor, arguments: dict[str, Any]) -> PipelineOutput:
        """See ``EditOptions``."""
        return editor.inpaint(**arguments, mask=self.mask, keep_pixels=self.keep_pixels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outpaint(EditOptions):
    """Extend an image downwards and to the right."""

    below: int = 0
    """Rows of codes to draw below it."""
    right: int = 0
    """Columns of codes to draw on its right."""

    def edit(self, editor: Editor, arguments: dict[str, Any]) -> PipelineOutput:
        """See ``EditOptions``."""
        return editor.outpaint(**arguments, below=self.below, right=self.right)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vary(EditOptions):
    """Draw variations of an image: codes here and there are kept, the others drawn."""

    keep: float = 0.5
    """Share of the codes that is kept, above 0 and below 1."""

    def edit(self, editor: Editor, arguments: dict[str, Any]) -> PipelineOutput:
        """See ``EditOptions``."""
        return editor.vary(**arguments, keep=self.keep)


def run(options: EditOptions) -> None:
    """Edit, save the images and print where they are."""
    if bool(options.prompts) == bool(options.classes):
        raise InputError("say what the image is of, with either --prompt or --class")
    arguments = given_settings(options, *CHOICES)
    options.require_out()
    if not options.image.is_file():
        raise FileNotFoundError(f"{options.image} does not exist; give an image file")
    device, dtype = options.resolve()

    from llamagen.pipeline import Pipeline
    from llamagen.pipeline.editing import Editor

    pipe = Pipeline.from_pretrained(options.model, device=device, dtype=dtype)
    options.quantize(pipe)
    arguments |= {
        "image": options.image,
        "prompt": [*options.prompts, *options.classes],
        "num_images_per_prompt": options.count,
        "seed": options.seed,
    }
    options.save(options.edit(Editor(pipe), arguments))
