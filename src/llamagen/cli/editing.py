"""What the commands that edit an image share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from llamagen.cli.options import DeviceOptions, QuantizationOptions, SamplingOptions
from llamagen.cli.saving import require_place, save_images
from llamagen.support.errors import InputError

if TYPE_CHECKING:
    from llamagen.pipeline import PipelineOutput
    from llamagen.pipeline.editing import Editor


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditOptions(SamplingOptions, QuantizationOptions, DeviceOptions):
    """Options of all commands that edit an image."""

    image: tyro.conf.Positional[Path]
    """The image. It is resized so that its short side is the model's, and its middle cut out."""
    model: str
    """Name (emoji, cifar10, c2i-L-384), pipeline folder or hub repository."""
    prompts: Annotated[tuple[str, ...], tyro.conf.arg(name="prompt", aliases=["-p"])] = ()
    """What the image is of, for text-conditional models; one text or several."""
    classes: Annotated[tuple[str, ...], tyro.conf.arg(name="class", aliases=["-c"])] = ()
    """What the image is of, for class-conditional models: classes by name or number."""
    count: Annotated[int, tyro.conf.arg(name="num-images", aliases=["-n"])] = 1
    """Images of each prompt or class."""
    seed: int | None = None
    """Seed of the first image; the next get the next numbers. Default: random."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("images")
    """Folder for the images (and a sheet of them), or a .png file for the sheet alone."""


def edit_image(
    options: EditOptions, edit: Callable[[Editor, dict[str, Any]], PipelineOutput]
) -> None:
    """Loads the model, edits, saves the images and prints where they are.

    Args:
        options: what was asked for.
        edit: is given the editor, and the arguments that all edits have.

    Raises:
        InputError: something that was asked for cannot be done.
    """
    wanted = [*options.prompts, *options.classes]
    if bool(options.prompts) == bool(options.classes):
        raise InputError("say what the image is of, with either --prompt or --class")
    settings = options.recorded()
    require_place(options.out)
    if not options.image.is_file():
        raise FileNotFoundError(f"{options.image} does not exist; give an image file")
    device, dtype = options.resolve()

    from llamagen.pipeline import Pipeline
    from llamagen.pipeline.editing import Editor

    pipe = Pipeline.from_pretrained(options.model, device=device, dtype=dtype)
    options.quantize(pipe)
    arguments = {
        "image": options.image,
        "prompt": wanted,
        "negative_prompt": options.negative_prompt,
        "num_images_per_prompt": options.count,
        "seed": options.seed,
        **options.ranking(),
        **settings,
    }
    for path in save_images(edit(Editor(pipe), arguments), options.out):
        print(path)
