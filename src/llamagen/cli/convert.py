"""``llamagen convert``, ``export`` and ``export-vllm``: commands that write model folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from llamagen.support.errors import InputError

if TYPE_CHECKING:
    from llamagen.checkpoints import PipelineSource
    from llamagen.config import SamplingConfig
    from llamagen.models.tokenizer import ImageTokenizer
    from llamagen.models.transformer import Transformer
    from llamagen.pipeline import Pipeline
    from llamagen.support.labels import Labels

    Parts = dict[str, tuple[str, ImageTokenizer | Transformer]]
    """Kind of model -> its source and itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Turn published .pt checkpoints into model folders, or models into another precision."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE...")]
    """Checkpoint files, published names or model folders: a transformer and its image tokenizer,
    in any order, or one of them; or a whole pipeline, by its folder or name (emoji). What a file
    is shows in its content."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write: a pipeline of two models, or one model."""
    grid: tuple[int, int] | None = None
    """Rows and columns of codes that the transformer was trained on, if its file does not say."""
    heads: int | None = None
    """Query heads of the transformer, if it is of no preset's size and its file does not say."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Precision of the written weights; keep leaves them as they are stored."""
    quantization: Literal["none", "int8"] = "none"
    """Weights of the transformer in 8 bits."""
    labels: Path | None = None
    """JSON list of class names. Default: ImageNet's for 1000 classes, else numbers."""
    name: str | None = None
    """Name of the pipeline. Default: the published name, or the folder's."""
    overwrite: bool = False
    """Replace an older model folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Write the model folder of a training run's checkpoint, also while the run goes on."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    out: Path
    """Where the model goes: a tokenizer's folder or a pipeline's."""
    step: int | None = None
    """Step of the checkpoint. Default: the latest."""
    weights: Literal["auto", "mean", "trained"] = "auto"
    """The running mean (EMA) or the trained weights; auto takes the mean if there is one."""
    tokenizer: str | None = None
    """Image tokenizer of a transformer, if it is no longer where the recipe says."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vllm:
    """Write a model folder that vLLM loads by itself, for ``vllm serve`` and other programs."""

    model: tyro.conf.Positional[str]
    """Name (c2i-L-384), pipeline folder, hub repository, transformer, or an exported folder."""
    out: Path
    """Folder to write; an older one of this kind is replaced."""
    guidance: bool = True
    """Serve requests with guidance. Without it a request costs half as much, and has none."""
    negative_prompts: bool = False
    """Serve prompts that guidance leads away from, instead of "no class" or "no text"."""
    grid: tuple[int, int] | None = None
    """Rows and columns of an image. Default: those that the model was trained on."""


def run(options: Convert | Run | Vllm) -> None:
    """Write the folder and print what was made, or where it is."""
    if isinstance(options, Convert):
        _convert(options)
    elif isinstance(options, Run):
        from llamagen.training.export import export_run

        model = export_run(
            options.run,
            options.out,
            step=options.step,
            weights=options.weights,
            tokenizer=options.tokenizer,
        )
        print(model)
    else:
        from llamagen.vllm_plugin.export import ExportOptions, export_for_vllm

        export = ExportOptions(
            guidance=options.guidance, negative_prompts=options.negative_prompts, grid=options.grid
        )
        print(export_for_vllm(options.model, options.out, export))


def _convert(options: Convert) -> None:
    import llamagen.support.storage as storage

    if not 1 <= (count := len(options.sources)) <= 2:
        expected = "name a transformer, an image tokenizer or both"
        raise InputError(f"{count} sources were given; {expected}")
    out = options.out.expanduser().absolute()
    _require_place(out, overwrite=options.overwrite)
    found = _pipeline_source(options)
    if found is not None:
        sources = (str(found.transformer), str(found.tokenizer))
        options = dataclasses.replace(options, sources=sources)
    parts = _load(options)
    with storage.atomic_folder(out) as folder:
        _assemble(parts, options, found).save_pretrained(folder)
    for source, model in parts.values():
        print(f"{source}: {_summary(model)}")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{options.out}: {size / 2**20:,.1f} MiB")


def _require_place(out: Path, *, overwrite: bool) -> None:
    """Check, before the long work, that the folder can be written."""
    import llamagen.support.storage as storage

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not any((out / name).is_file() for name in ("config.json", "model_index.json")):
            raise InputError(f"{out} exists and is no model folder; choose another --out")
        if not overwrite:
            raise InputError(f"{out} holds a model already; give --overwrite to replace it")
    storage.require_writable(out.parent)


def _pipeline_source(options: Convert) -> PipelineSource | None:
    """Return the parts of the only source, if it is a whole pipeline on this machine."""
    from llamagen.checkpoints import find_shipped, is_pipeline_folder, resolve_pipeline

    source = options.sources[0]
    folder = find_shipped(source) or Path(source).expanduser()
    if len(options.sources) > 1 or not is_pipeline_folder(folder):
        return None
    if (options.grid or options.heads) is not None:
        raise InputError(f"--grid and --heads describe a checkpoint file; {source} is a pipeline")
    found = resolve_pipeline(folder)
    if found.tokenizer is None:
        raise InputError(
            f"{source} has no image tokenizer; give its transformer, and one beside it"
        )
    return found


def _load(options: Convert) -> Parts:
    import torch

    from llamagen.checkpoints import load_model
    from llamagen.models.transformer import Transformer
    from llamagen.models.transformer.quantization import quantize

    dtype = None if options.dtype == "keep" else getattr(torch, options.dtype)
    parts: Parts = {}
    for source in options.sources:
        model = load_model(source, grid=options.grid, heads=options.heads, dtype=dtype)
        if model.kind in parts:
            raise InputError(
                f"{parts[model.kind][0]} and {source} are two models of one kind "
                f"({model.kind}); a pipeline has one transformer and one image tokenizer"
            )
        parts[model.kind] = (source, model)
        if isinstance(model, Transformer) and options.quantization != "none":
            quantize(model)
    if Transformer.kind not in parts:
        if (options.grid or options.heads) is not None:
            raise InputError("--grid and --heads describe a transformer, but none was given")
        if options.quantization != "none":
            raise InputError("--quantization is for a transformer, but none was given")
    if len(parts) == 1 and (options.labels or options.name) is not None:
        raise InputError("--labels and --name belong to a pipeline; give both of its models")
    return parts


def _assemble(
    parts: Parts, options: Convert, found: PipelineSource | None
) -> Pipeline | ImageTokenizer | Transformer:
    """Return the only model, or the pipeline of both."""
    from llamagen.checkpoints import demo_sampling, find_public
    from llamagen.models.tokenizer import ImageTokenizer
    from llamagen.models.transformer import Transformer
    from llamagen.pipeline import Pipeline

    if len(parts) == 1:
        return next(iter(parts.values()))[1]
    source, transformer = parts[Transformer.kind]
    _, tokenizer = parts[ImageTokenizer.kind]
    assert isinstance(transformer, Transformer)
    assert isinstance(tokenizer, ImageTokenizer)
    labels = _labels(transformer, options.labels)
    sampling: SamplingConfig | None
    if found is None:
        public = find_public(source)
        name = options.out.resolve().name if public is None else public.name
        sampling, text = demo_sampling(transformer.config), None
    else:
        name, sampling, text = found.name, found.sampling, found.text
        labels = labels if options.labels is not None else found.labels
    return Pipeline(
        tokenizer,
        transformer,
        labels=labels,
        name=options.name or name,
        sampling=sampling,
        text_encoder=text,
    )


def _labels(transformer: Transformer, path: Path | None) -> Labels | None:
    from llamagen.support.labels import Labels

    is_text = transformer.config.condition == "text"
    if path is not None:
        if is_text:
            raise InputError("the transformer is conditioned on text; leave --labels out")
        return Labels.load(path)
    imagenet = Labels.imagenet()
    is_imagenet = not is_text and len(imagenet) == transformer.config.num_classes
    return imagenet if is_imagenet else None


def _summary(model: ImageTokenizer | Transformer) -> str:
    from llamagen.models.transformer import Transformer

    text = f"{model.kind}, {model.parameter_count():,} parameters in {str(model.dtype)[6:]}, "
    if not isinstance(model, Transformer):
        config = model.config
        return f"{text}{config.codebook_size} codes, downsampling {config.downsampling}"
    rows, columns = model.config.grid
    if model.config.quantization is not None:
        text += f"matrices in {model.config.quantization}, "
    what = "text" if model.config.condition == "text" else f"{model.config.num_classes} classes"
    return f"{text}grid {rows}x{columns}, {what}"
