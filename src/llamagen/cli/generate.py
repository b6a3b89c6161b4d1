"""Draw images of texts or classes, as PNG files that record how to make them again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from llamagen.cli.options import (
    DeviceOptions,
    EngineOptions,
    QuantizationOptions,
    SamplingOptions,
    given_settings,
)
from llamagen.cli.saving import require_place, save_images
from llamagen.config import SamplingConfig, sampling_settings
from llamagen.support.errors import InputError

if TYPE_CHECKING:
    import torch

    from llamagen.generation.engine import Progress
    from llamagen.pipeline import Pipeline, PipelineOutput

_BATCH = 16
"""Images of a file of prompts that are drawn at once, unless said otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(EngineOptions, SamplingOptions, QuantizationOptions, DeviceOptions):
    """Options of ``llamagen generate``."""

    model: str | None = None
    """Name (emoji, c2i-L-384, t2i-XL-256), pipeline folder, hub repository, or a transformer to
    be used with --tokenizer."""
    prompts: Annotated[tuple[str, ...], tyro.conf.arg(name="prompt", aliases=["-p"])] = ()
    """What to draw, for text-conditional models; one text or several."""
    prompts_file: Path | None = None
    """File of prompts (.txt, .csv, .tsv, .jsonl, .json, as those of PartiPrompts and COCO): all are
    drawn into the output folder, with an index. The same command goes on where it stopped; under
    torchrun the processes share the work."""
    prompt_column: str | None = None
    """Column of the prompts in that file. Default: prompt, text or caption."""
    classes: Annotated[tuple[str, ...], tyro.conf.arg(name="class", aliases=["-c"])] = ()
    """What to draw, for class-conditional models: classes by name or number, one or several."""
    count: Annotated[int, tyro.conf.arg(name="num-images", aliases=["-n"])] = 1
    """Images of each prompt or class."""
    seed: int | None = None
    """Seed of the first image; the next get the next numbers. Default: random; 0 for a file of
    prompts."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("images")
    """Folder for the images (and a sheet of them), or a .png file for the sheet alone."""
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
    """Generates and saves what ``options`` ask for."""
    if options.prompts_file is not None:
        _draw_file(options, options.prompts_file)
        return
    settings = _settings(options)
    source = settings.pop("model")
    require_place(options.out)

    precision = {name: settings.pop(name) for name in ("dtype", "quantization", "kv_cache_dtype")}
    options = dataclasses.replace(options, **precision)
    device, dtype = options.resolve()
    pipe = _load(source, options, device, dtype)
    output = _generate(pipe, settings, options)
    for path in save_images(output, options.out, columns=options.columns):
        print(path)


def _load(source: str, options: Options, device: torch.device, dtype: torch.dtype) -> Pipeline:
    from llamagen.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(
        source,
        tokenizer=options.tokenizer,
        text_encoder=options.text_encoder,
        grid=options.grid,
        device=device,
        dtype=dtype,
        engine=options.engine,
        engine_options=_engine_options(options),
    )
    if options.adapter is not None:
        pipe.load_adapter(options.adapter)
    options.quantize(pipe)
    return pipe


def _engine_options(options: Options) -> dict[str, Any] | None:
    """What vLLM is started with, if it is."""
    found = options.vllm_options()
    if found is None:
        return None
    from llamagen.vllm_plugin.export import ExportOptions

    export = ExportOptions(
        guidance=SamplingConfig().replace(**given_settings(options)).guided,
        negative_prompts=options.negative_prompt is not None or options.like is not None,
    )
    return {**found, "export": export}


def _draw_file(options: Options, path: Path) -> None:
    """Draws all prompts of a file into the output folder."""
    if options.prompts or options.classes or options.like is not None:
        raise InputError("--prompts-file goes without --prompt, --class and --like")
    if options.model is None:
        raise InputError("no model was named; give --model")
    if options.count < 1:
        raise InputError(f"--num-images is {options.count}, expected at least 1")
    from llamagen.text.prompt_files import read_prompts

    prompts = read_prompts(path, column=options.prompt_column)
    from tqdm import tqdm

    from llamagen.pipeline.saving import batches, draw_into_folder, plan_images
    from llamagen.support.devices import keep_freed_memory
    from llamagen.support.launch import Launch, own_device

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
            negative_prompt=options.negative_prompt,
            **options.recorded(),
            **(options.ranking() if options.best_of != 1 else {}),
        )
    print(f"{drawn} images drawn of {len(planned)}")
    print(options.out)


def _settings(options: Options) -> dict[str, Any]:
    """What to generate: the options, with what ``--like`` says where they say nothing."""
    recorded: dict[str, Any] = {}
    if options.like is not None:
        from llamagen.support.pictures import read_metadata

        recorded = read_metadata(options.like)
        if "edit" in recorded:
            raise InputError(
                f"{options.like} was edited from another image (llamagen edit); --like makes "
                f"generated ones again"
            )
        for name, value in (("row_lag", None), ("quantization", "int4")):
            if name in recorded and value in (None, recorded[name]):
                raise InputError(
                    f"{options.like} was made with {value or name}, which was removed; give its "
                    f"prompt and seed instead of --like"
                )
    model = options.model or recorded.get("model")
    if model is None:
        raise InputError("no model was named; give --model, for example --model c2i-L-384")
    if options.prompts and options.classes:
        raise InputError("give either --prompt or --class, not both")
    wanted: list[str | int] = [*options.prompts, *options.classes]
    negative = options.negative_prompt
    if not wanted:
        wanted = [recorded[name] for name in ("prompt", "class_index") if name in recorded][:1]
        negative = recorded.get("negative_prompt") if negative is None else negative
    if not wanted:
        raise InputError(
            'there is nothing to draw; give --prompt, or --class, for example --class "golden '
            'retriever"'
        )
    names = [each.name for each in sampling_settings()]
    names += ["blend", "blend_share", "seed"]
    settings = {name: recorded[name] for name in names if name in recorded}
    settings |= options.recorded()
    if options.seed is not None:
        settings["seed"] = options.seed
    dtype = options.dtype
    if dtype == "auto" and "dtype" in recorded:
        dtype = recorded["dtype"]
    quantization = options.quantization
    if quantization == "none":
        quantization = recorded.get("quantization", "none")
    kept = options.kv_cache_dtype
    if kept == "auto":
        kept = recorded.get("kv_cache_dtype", "auto")
    return {
        "model": model,
        "quantization": quantization,
        "kv_cache_dtype": kept,
        "prompt": wanted,
        "negative_prompt": negative,
        "dtype": dtype,
        **options.ranking(),
        **settings,
    }


def _generate(pipe: Pipeline, settings: dict[str, Any], options: Options) -> PipelineOutput:
    from tqdm import tqdm

    images = len(settings["prompt"]) * options.count
    rows = pipe.transformer.config.grid[0]
    with tqdm(total=images * rows, desc="drawing", unit="row", disable=None) as bar:

        def show(progress: Progress) -> None:
            bar.update(progress.codes.shape[0])

        return pipe(
            **settings,
            num_images_per_prompt=options.count,
            batch_size=options.batch_size,
            window=options.window,
            callback=show,
        )
