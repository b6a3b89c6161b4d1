"""``llamagen generate`` and ``llamagen edit``: the commands that make images."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from llamagen.cli.options import (
    DeviceOptions,
    EngineOptions,
    QuantizationOptions,
    given_settings,
    require_at_least,
    setting_options,
)
from llamagen.config import SamplingConfig, sampling_settings
from llamagen.support.errors import InputError
from llamagen.support.launch import Launch, own_device

if TYPE_CHECKING:
    from PIL import Image

    from llamagen.generation.engine import Progress
    from llamagen.pipeline import Pipeline, PipelineOutput

_BATCH = 16
"""Images that are drawn at once on a CPU, or of a file of prompts, unless said otherwise: more are
hardly faster, and later."""
_SHEET_IMAGES = 400
"""The most images on a sheet beside files of their own: the first."""
_CHOICES = ("negative_prompt", "blend", "blend_share", "best_of", "rank_by")
"""Options that are arguments of a pipeline besides the sampling settings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ImageOptions(setting_options(), QuantizationOptions, DeviceOptions):  # type: ignore[misc]
    """Options of the commands that make images."""

    negative_prompt: str | None = None
    """Text, or class, that guidance leads away from. Default: the model's "no text"."""
    blend: str | None = None
    """Text, or class, that every prompt or class is blended with."""
    blend_share: float | None = None
    """How much that counts, from 0 to 1. Default: 0.5."""
    best_of: int = 1
    """Candidates for each image, of which the best is returned."""
    rank_by: Literal["likelihood", "condition"] = "likelihood"
    """How the best is chosen: likelihood, the most likely codes, which tend to be plain; or
    condition, those that the prompt or class makes more likely."""
    prompts: Annotated[tuple[str, ...], tyro.conf.arg(name="prompt", aliases=["-p"])] = ()
    """Prompts, for text-conditional models; one text or several."""
    classes: Annotated[tuple[str, ...], tyro.conf.arg(name="class", aliases=["-c"])] = ()
    """Classes, for class-conditional models; by name or number, one or several."""
    count: Annotated[int, tyro.conf.arg(name="num-images", aliases=["-n"])] = 1
    """Images of each prompt or class."""
    seed: int | None = None
    """Seed of the first image; the next count up. Default: random; 0 for a file of prompts."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("images")
    """Folder for the images and a sheet of them, or a .png, .jpg or .webp file for the sheet alone.
    In a folder nothing is overwritten, and the same command goes on where it stopped."""

    @property
    def _kind(self) -> Any:
        """Format of the file for the sheet alone; None for a folder."""
        from llamagen.support.pictures import KINDS

        return None if self.out.is_dir() else KINDS.get(self.out.suffix.lower())

    def _arguments(self) -> dict[str, Any]:
        """Return the pipeline's arguments that all these commands have, the settings checked."""
        return {
            "prompt": [*self.prompts, *self.classes],
            "num_images_per_prompt": self.count,
            "seed": self.seed,
            **given_settings(self, *_CHOICES),
        }

    def require_out(self) -> None:
        """Raise InputError or OSError, before any image is made, if none can be saved."""
        import llamagen.support.storage as storage
        from llamagen.data.images import EXTENSIONS

        is_file = self.out.suffix.lower() in EXTENSIONS or self.out.exists()
        if self._kind is None and is_file and not self.out.is_dir():
            raise InputError(
                f"{self.out} is a file of another kind; give --out a folder, or a name ending in "
                f".png, .jpg or .webp"
            )
        storage.require_writable(self.out if self._kind is None else self.out.parent)

    def save(self, output: PipelineOutput, about: Mapping[str, Any]) -> dict[int, Path]:
        """Save images in the folder and print where; return that by seed. ``about``: metadata."""
        from tqdm import tqdm

        from llamagen.pipeline.saving import image_path, save_image

        paths = {}
        for image, metadata in zip(output.images, output.metadata, strict=True):
            entry = {**metadata, **about}
            path = paths[metadata["seed"]] = save_image(image, image_path(self.out, entry), entry)
            # Not through the progress bar.
            tqdm.write(str(path))
        return paths

    def save_sheet(
        self,
        images: Sequence[Image.Image],
        metadata: Mapping[str, Any] | None = None,
        columns: int | None = None,
    ) -> None:
        """Save a sheet of images and print where; of one, the image with its ``metadata``."""
        import llamagen.support.storage as storage
        from llamagen.pipeline.saving import save_image
        from llamagen.support.pictures import image_bytes, image_grid

        alone, path = len(images) == 1, self.out
        sheet = images[0] if alone else image_grid(images, columns=columns)
        if self._kind is None:
            path = save_image(sheet, path / "sheet.png")
        else:
            content = image_bytes(sheet, self._kind, metadata=metadata if alone else None)
            storage.write_bytes(path, content)
        print(path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(EngineOptions, _ImageOptions):
    """Draw images of texts or classes, as PNG files that record how to make them again."""

    model: str | None = None
    """Name (emoji, c2i-L-384), pipeline folder, hub repository, or a transformer (--tokenizer)."""
    prompts_file: Path | None = None
    """File of prompts (.txt, .csv, .tsv, .jsonl, .json, as those of PartiPrompts and COCO): all are
    drawn into the output folder, with an index. The same command goes on where it stopped; under
    torchrun the processes share the work."""
    prompt_column: str | None = None
    """Column of the prompts in that file. Default: prompt, text or caption."""
    like: Path | None = None
    """Make the image in this file again: prompt or class, seed and settings are read from it."""
    tokenizer: str | None = None
    """Another image tokenizer than the model's: published name, folder or checkpoint file."""
    text_encoder: str | None = None
    """Another text encoder than the model's: folder or hub repository."""
    adapter: Path | None = None
    """Folder of what fine-tuning with LoRA has made of the model."""
    grid: tuple[int, int] | None = None
    """Rows and columns of codes, for checkpoint files that do not say."""
    columns: int | None = None
    """Images per row of the sheet."""
    batch_size: int | None = None
    """Images drawn at once. Default: 16 on a CPU, else as many as fit into memory."""
    window: int | None = None
    """Codes of each image that a pass looks at: faster for few images, and the same image. 1 draws
    one by one. Default: chosen."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EditOptions(_ImageOptions):
    """Options of the commands that edit an image: each a method of ``Editor`` and its arguments."""

    image: tyro.conf.Positional[Path]
    """The image. It is resized so that its short side is the model's, and its middle cut out."""
    model: str
    """Name (emoji, cifar10, c2i-L-384), pipeline folder or hub repository."""

    def _arguments(self) -> dict[str, Any]:
        return super()._arguments() | {"image": self.image}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Complete(_EditOptions):
    """Keep the upper part of an image and draw the rest."""

    keep_rows: int | None = None
    """Rows of codes that are kept. Default: half of them."""

    def _arguments(self) -> dict[str, Any]:
        return super()._arguments() | {"keep_rows": self.keep_rows}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inpaint(_EditOptions):
    """Draw a marked part of an image anew."""

    mask: Path
    """An image of the same size, white where to draw; or, if any of it is more transparent than
    opaque, transparent there."""
    keep_pixels: bool = True
    """Leave what is not marked as it is, instead of what codes make of it."""
    best_of: int | None = None  # type: ignore[assignment]  # the editor's own number
    """Candidates for each image, of which the best is returned. Default: 1, or 4 in raster order,
    where others may not fit what is below the marked part."""

    def _arguments(self) -> dict[str, Any]:
        return super()._arguments() | {"mask": self.mask, "keep_pixels": self.keep_pixels}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outpaint(_EditOptions):
    """Extend an image downwards and to the right, or in any order on all sides."""

    above: int = 0
    """Rows of codes to draw above it (models of random order)."""
    below: int = 0
    """Rows of codes to draw below it."""
    left: int = 0
    """Columns of codes to draw on its left (models of random order)."""
    right: int = 0
    """Columns of codes to draw on its right."""

    def _arguments(self) -> dict[str, Any]:
        sides = {"above": self.above, "below": self.below, "left": self.left, "right": self.right}
        return super()._arguments() | sides


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vary(_EditOptions):
    """Draw variations of an image: codes here and there are kept, the others drawn."""

    keep: float = 0.5
    """Share of the codes that is kept, above 0 and below 1."""

    def _arguments(self) -> dict[str, Any]:
        return super()._arguments() | {"keep": self.keep}


def run(options: Generate | _EditOptions) -> None:
    """Make images, save them and print where they are."""
    if isinstance(options, _EditOptions):
        _edit(options)
        return
    if options.like is not None and options.prompts_file is None:
        options = _like(options, options.like)
    if options.model is None:
        raise InputError("no model was named; give --model, for example --model c2i-L-384")
    if options.prompts_file is not None:
        _draw_file(options, options.model, options.prompts_file)
    else:
        _draw(options, options.model)


def _draw(options: Generate, model: str) -> None:
    if options.prompts and options.classes:
        raise InputError("give either --prompt or --class, not both")
    if not options.prompts and not options.classes:
        raise InputError(
            'there is nothing to draw; give --prompt, or --class, for example --class "golden '
            'retriever"'
        )
    require_at_least(1, options, "columns", "batch_size")
    arguments = options._arguments()
    options.require_out()
    pipe = _load(model, options, Launch())
    from tqdm import tqdm

    from llamagen.data.images import open_image
    from llamagen.generation.request import one_seed_each
    from llamagen.pipeline.saving import find_image, image_path
    from llamagen.support.pictures import read_metadata

    # Known here, so that a command without one can go on.
    arguments["seed"] = one_seed_each(options.seed, 1)[0]
    size = _BATCH if pipe.device.type == "cpu" else None
    arguments |= {"batch_size": options.batch_size or size, "window": options.window}
    # Another model of the same name draws other images.
    about = {"weights": pipe.weight_sample()}
    images = len(arguments["prompt"]) * options.count
    rows = pipe.transformer.config.grid[0] * options.best_of
    paths: dict[int, Path] = {}
    with tqdm(total=images * rows, desc="drawing", unit="row", disable=None) as bar:

        def show(progress: Progress) -> None:
            bar.update(progress.codes.shape[0])

        def is_drawn(metadata: dict[str, Any]) -> bool:
            entry = metadata | about
            found = find_image(image_path(options.out, entry), entry)
            if found is not None:
                paths[entry["seed"]] = found
                tqdm.write(str(found))
                bar.update(rows)
            return found is not None

        if options._kind is not None:
            output = pipe(**arguments, callback=show)
            if options.like is not None:
                _warn_of_other_codes(options.like, output.metadata[0] | about)
            options.save_sheet(output.images, output.metadata[0] | about, options.columns)
            return
        try:
            pipe(
                **arguments,
                callback=show,
                is_drawn=is_drawn,
                on_images=lambda output: paths.update(options.save(output, about)),
            )
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(
                f"{len(paths)} of {images} images are in {options.out}; the same command with "
                f"--seed {arguments['seed']} goes on"
            ) from error
    if images > 1:
        # By seed, which is the order of the images.
        first = [path for _, path in sorted(paths.items())][:_SHEET_IMAGES]
        options.save_sheet([*map(open_image, first)], columns=options.columns)
    if options.like is not None:
        _warn_of_other_codes(options.like, read_metadata(min(paths.values())))


def _warn_of_other_codes(like: Path, now: dict[str, Any]) -> None:
    """Say what may have changed codes, by its rounding, since an image was drawn."""
    from llamagen.support.pictures import read_metadata

    recorded = read_metadata(like)
    names = ("weights", "engine", "kernels", "text_encoder_dtype", "device")
    for name in names:
        if name in recorded and recorded[name] != now.get(name):
            print(
                f"note: {like} was drawn with {name} {recorded[name]}, this with {now.get(name)}: "
                f"codes may differ",
                file=sys.stderr,
            )


def _load(model: str, options: Generate, launch: Launch) -> Pipeline:
    from llamagen.pipeline import Pipeline

    device, dtype = options.resolve()
    engine_options = options.vllm_options()
    if engine_options is not None:
        from llamagen.vllm_plugin.export import ExportOptions

        engine_options["export"] = ExportOptions(
            guidance=SamplingConfig().replace(**given_settings(options)).guided,
            negative_prompts=options.negative_prompt is not None or options.like is not None,
        )
    pipe = Pipeline.from_pretrained(
        model,
        tokenizer=options.tokenizer,
        text_encoder=options.text_encoder,
        grid=options.grid,
        device=own_device(device, launch),
        dtype=dtype,
        engine=options.engine,
        engine_options=engine_options,
    )
    if options.adapter is not None:
        pipe.load_adapter(options.adapter)
    options.quantize(pipe)
    return pipe


def _draw_file(options: Generate, model: str, path: Path) -> None:
    """Draw all prompts of a file into the output folder."""
    if options.prompts or options.classes or options.like is not None:
        raise InputError("--prompts-file goes without --prompt, --class and --like")
    require_at_least(1, options, "count", "batch_size", "best_of")
    from llamagen.data.sources import read_prompts

    prompts = read_prompts(path, column=options.prompt_column)
    from tqdm import tqdm

    from llamagen.pipeline.saving import batches, draw_into_folder, plan_images
    from llamagen.support.devices import keep_freed_memory

    arguments = given_settings(options, *_CHOICES)
    if options.best_of == 1:
        del arguments["best_of"], arguments["rank_by"]
    launch = Launch.current()
    pipe = _load(model, options, launch)
    # Now: what loading has freed goes back to the system, what batches free serves the next ones.
    keep_freed_memory()
    planned = plan_images(
        prompts,
        images_per_prompt=options.count,
        seed=options.seed or 0,
        best_of=options.best_of,
    )
    size = options.batch_size or _BATCH
    own = sum(map(len, batches(planned, size, launch.rank, launch.world_size)))
    with tqdm(total=own, desc="drawing", unit="image", disable=None) as bar:
        drawn = draw_into_folder(
            pipe,
            planned,
            options.out,
            batch_size=size,
            window=options.window,
            rank=launch.rank,
            world_size=launch.world_size,
            progress=bar.update,
            **arguments,
        )
    print(f"{drawn} images drawn of {len(planned)}")
    print(options.out)


def _like(options: Generate, path: Path) -> Generate:
    """Return the options where those at their defaults are as an image has recorded them."""
    from llamagen.support.labels import RecordedName
    from llamagen.support.pictures import read_metadata

    recorded = read_metadata(path)
    if "edit" in recorded:
        raise InputError(
            f"{path} was edited from another image (llamagen edit); --like makes generated ones "
            f"again"
        )
    for name, value in (("row_lag", None), ("quantization", "int4")):
        if name in recorded and value in (None, recorded[name]):
            remedy = "give its prompt and seed instead of --like"
            raise InputError(f"{path} was made with {value or name}, which was removed; {remedy}")
    # Another model has other indices.
    for name in {"prompt", "class", "negative_prompt", "blend"} & recorded.keys():
        index = recorded.get("class_index", -1) if name == "class" else -1
        recorded[name] = RecordedName(recorded[name], index)
    names = {each.name for each in sampling_settings()}
    names |= {"model", "dtype", "quantization", "kv_cache_dtype", "blend", "blend_share", "seed"}
    if not options.prompts and not options.classes:
        names |= {"prompts", "classes", "negative_prompt"}
        if "prompt" in recorded:
            recorded["prompts"] = (recorded["prompt"],)
        elif "class" in recorded:
            recorded["classes"] = (recorded["class"],)
    unset = {name for name in names if getattr(options, name) == getattr(Generate, name, None)}
    return dataclasses.replace(options, **{n: recorded[n] for n in unset & recorded.keys()})


def _edit(options: _EditOptions) -> None:
    if bool(options.prompts) == bool(options.classes):
        raise InputError("say what the image is of, with either --prompt or --class")
    arguments = options._arguments()
    options.require_out()
    if not options.image.is_file():
        raise FileNotFoundError(f"{options.image} does not exist; give an image file")
    device, dtype = options.resolve()

    from llamagen.pipeline import Pipeline
    from llamagen.pipeline.editing import Editor

    pipe = Pipeline.from_pretrained(options.model, device=device, dtype=dtype)
    options.quantize(pipe)
    edit = getattr(Editor(pipe), type(options).__name__.lower())
    output = edit(**arguments)
    if options._kind is None:
        options.save(output, {})
    if options._kind is not None or len(output.images) > 1:
        options.save_sheet(output.images, output.metadata[0])
