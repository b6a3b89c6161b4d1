"""Draw images of texts or classes, as PNG files that record how to make them again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from llamagen.cli.options import (
    CHOICES,
    EngineOptions,
    ImageOptions,
    given_settings,
    require_at_least,
)
from llamagen.config import SamplingConfig, sampling_settings
from llamagen.support.errors import InputError

if TYPE_CHECKING:
    import torch

    from llamagen.generation.engine import Progress
    from llamagen.pipeline import Pipeline

_BATCH = 16
"""Images of a file of prompts that are drawn at once, unless said otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(EngineOptions, ImageOptions):
    """Options of ``llamagen generate``."""

    model: str | None = None
    """Name (emoji, c2i-L-384, t2i-XL-256), pipeline folder, hub repository, or a transformer to
    be used with --tokenizer."""
    prompts_file: Path | None = None
    """File of prompts (.txt, .csv, .tsv, .jsonl, .json, as those of PartiPrompts and COCO): all are
    drawn into the output folder, with an index. The same command goes on where it stopped; under
    torchrun the processes share the work."""
    prompt_column: str | None = None
    """Column of the prompts in that file. Default: prompt, text or caption."""
    like: Path | None = None
    """Make the image in this PNG again: prompt or class, seed and settings are read from it."""
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
    """Images drawn at once. Default: as many as fit into memory."""
    window: int | None = None
    """Codes of each image that a pass looks at: faster for few images, and the same image. 1 draws
    one by one. Default: chosen."""


def run(options: Options) -> None:
    """Generate images, save them and print where they are."""
    if options.prompts_file is not None:
        _draw_file(options, options.prompts_file)
        return
    if options.like is not None:
        options = _like(options, options.like)
    if options.model is None:
        raise InputError("no model was named; give --model, for example --model c2i-L-384")
    if options.prompts and options.classes:
        raise InputError("give either --prompt or --class, not both")
    wanted = [*options.prompts, *options.classes]
    if not wanted:
        raise InputError(
            'there is nothing to draw; give --prompt, or --class, for example --class "golden '
            'retriever"'
        )
    arguments = given_settings(options, *CHOICES)
    options.require_out()
    device, dtype = options.resolve()
    pipe = _load(options.model, options, device, dtype)
    from tqdm import tqdm

    rows = len(wanted) * options.count * pipe.transformer.config.grid[0]
    with tqdm(total=rows, desc="drawing", unit="row", disable=None) as bar:

        def show(progress: Progress) -> None:
            bar.update(progress.codes.shape[0])

        output = pipe(
            wanted,
            num_images_per_prompt=options.count,
            seed=options.seed,
            batch_size=options.batch_size,
            window=options.window,
            callback=show,
            **arguments,
        )
    options.save(output, columns=options.columns)


def _load(source: str, options: Options, device: torch.device, dtype: torch.dtype) -> Pipeline:
    from llamagen.pipeline import Pipeline

    engine_options = options.vllm_options()
    if engine_options is not None:
        from llamagen.vllm_plugin.export import ExportOptions

        engine_options["export"] = ExportOptions(
            guidance=SamplingConfig().replace(**given_settings(options)).guided,
            negative_prompts=options.negative_prompt is not None or options.like is not None,
        )
    pipe = Pipeline.from_pretrained(
        source,
        tokenizer=options.tokenizer,
        text_encoder=options.text_encoder,
        grid=options.grid,
        device=device,
        dtype=dtype,
        engine=options.engine,
        engine_options=engine_options,
    )
    if options.adapter is not None:
        pipe.load_adapter(options.adapter)
    options.quantize(pipe)
    return pipe


def _draw_file(options: Options, path: Path) -> None:
    """Draw all prompts of a file into the output folder."""
    if options.prompts or options.classes or options.like is not None:
        raise InputError("--prompts-file goes without --prompt, --class and --like")
    if options.model is None:
        raise InputError("no model was named; give --model")
    require_at_least(1, options, "count")
    from llamagen.data.sources import read_prompts

    prompts = read_prompts(path, column=options.prompt_column)
    from tqdm import tqdm

    from llamagen.pipeline.saving import batches, draw_into_folder, plan_images
    from llamagen.support.devices import keep_freed_memory
    from llamagen.support.launch import Launch, own_device

    arguments = given_settings(options, *CHOICES)
    if options.best_of == 1:
        del arguments["best_of"], arguments["rank_by"]
    device, dtype = options.resolve()
    launch = Launch.current()
    pipe = _load(options.model, options, own_device(device, launch), dtype)
    # Now: what loading has freed goes back to the system, what batches free serves the next ones.
    keep_freed_memory()
    planned = plan_images(prompts, images_per_prompt=options.count, seed=options.seed or 0)
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


def _like(options: Options, path: Path) -> Options:
    """Return the options where those at their defaults are as an image has recorded them."""
    from llamagen.support.pictures import read_metadata

    recorded = read_metadata(path)
    if "edit" in recorded:
        raise InputError(
            f"{path} was edited from another image (llamagen edit); --like makes generated ones "
            f"again"
        )
    for name, value in (("row_lag", None), ("quantization", "int4")):
        if name in recorded and value in (None, recorded[name]):
            raise InputError(
                f"{path} was made with {value or name}, which was removed; give its prompt and "
                f"seed instead of --like"
            )
    names = {each.name for each in sampling_settings()}
    names |= {"model", "dtype", "quantization", "kv_cache_dtype", "blend", "blend_share", "seed"}
    if not options.prompts and not options.classes:
        names |= {"prompts", "classes", "negative_prompt"}
        if "prompt" in recorded:
            recorded["prompts"] = (recorded["prompt"],)
        elif "class_index" in recorded:
            recorded["classes"] = (recorded["class_index"],)
    unset = {name for name in names if getattr(options, name) == getattr(Options, name, None)}
    return dataclasses.replace(options, **{n: recorded[n] for n in unset & recorded.keys()})
