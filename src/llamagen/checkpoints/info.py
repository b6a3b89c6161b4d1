"""Summary of a model: architecture, size on disk and in memory, settings.

Names and shapes of weights are read, never the weights.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import try_to_load_from_cache

from llamagen.checkpoints.load import load_tokenizer, load_transformer
from llamagen.checkpoints.names import PublicModel
from llamagen.checkpoints.sources import Part, Source, find_local, locate, resolve_pipeline
from llamagen.config import Grid, SamplingConfig, TextConfig, config_to_dict, read_json
from llamagen.models.pretrained import CONFIG_NAME, weight_files
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.models.transformer import KVCache, Transformer
from llamagen.models.transformer.quantization import make_quantized
from llamagen.support.devices import dtype_name
from llamagen.support.errors import InputError
from llamagen.support.hub import is_repo_id
from llamagen.support.weights import read_safetensors, safetensors_shapes

Precision = Literal["float32", "bfloat16", "int8"]
"""Of the transformer's weights; with int8 all other weights are bfloat16."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartSummary:
    """One model of a pipeline, or a model on its own."""

    kind: str
    """One of "transformer", "image tokenizer" and "text encoder"."""
    parameters: int | None = None
    """None for a text encoder that is not on this machine."""
    disk_bytes: int | None = None
    """Size of its files; None if they are not on this machine."""
    memory: dict[Precision, int] = dataclasses.field(default_factory=dict)
    """Bytes of its weights in each precision of the whole model."""
    stored_as: str | None = None
    """Precision or quantisation of its files; None as for ``disk_bytes``."""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Its architecture, as far as it is known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """A model of any kind. Values that do not apply or are not known are None or empty."""

    name: str
    parts: tuple[PartSummary, ...]
    parameters: int
    """Of all parts whose number is known."""
    disk_bytes: int | None
    """Of all parts on this machine and the files beside them; None if there are none."""
    memory: dict[Precision, int]
    """Bytes of the weights of all known parts in each precision."""
    kv_cache: dict[str, int] | None = None
    """Bytes that one image takes with guidance (two sequences), in float32 and bfloat16."""
    grid: Grid | None = None
    codes: int | None = None
    """Codes per image."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels."""
    condition: Literal["class", "text"] | None = None
    classes: int | None = None
    class_names: tuple[str, ...] = ()
    text: TextConfig | None = None
    sampling: SamplingConfig | None = None
    """Settings for calls that give none."""


def describe_model(source: Source) -> ModelSummary:
    """Return the summary of a pipeline, a transformer, an image tokenizer or a text encoder.

    A published model that is not on this machine is described by what is known of it, and not
    downloaded; a hub repository is. FileNotFoundError if a file is missing; InputError if there is
    no such model, or it is damaged.
    """
    path = Path(source).expanduser()
    name = path.resolve().name if path.exists() else str(source)
    if is_text_encoder(path):
        return _alone(name, _text_encoder(str(path), required=True))
    try:
        found = resolve_pipeline(source)
    except InputError as error:
        # A tokenizer on its own is no pipeline, but can be described all the same.
        try:
            return _alone(name, _model(source, "tokenizer")[1])
        except InputError:
            raise error from None
    transformer, part = _model(found.transformer, "transformer")
    assert isinstance(transformer, Transformer)
    config, parts, image_size = transformer.config, [part], None
    if found.tokenizer is not None:
        tokenizer, part = _model(found.tokenizer, "tokenizer")
        assert isinstance(tokenizer, ImageTokenizer)
        parts.append(part)
        factor = tokenizer.config.downsampling
        image_size = (factor * config.grid[0], factor * config.grid[1])
    if found.text is not None:
        parts.append(_text_encoder(found.text.encoder))
    positions = config.condition_length + config.tokens_per_code * config.num_codes
    is_class = config.condition == "class"
    return _summary(
        found.name,
        *parts,
        # Index, class names, model card.
        beside=0 if found.folder is None else _bytes_of(found.folder.iterdir()),
        kv_cache={
            dtype_name(dtype): 2 * KVCache.bytes_per_sequence(config, positions, dtype)
            for dtype in (torch.float32, torch.bfloat16, torch.int8)
        },
        grid=config.grid,
        codes=config.num_codes,
        image_size=image_size,
        condition=config.condition,
        classes=config.num_classes if is_class else None,
        class_names=found.labels.names if found.labels is not None and is_class else (),
        text=found.text,
        sampling=found.sampling,
    )


def is_text_encoder(path: Path) -> bool:
    """Return whether a folder holds a text encoder of the T5 family."""
    file = path / CONFIG_NAME
    return file.is_file() and read_json(file).get("model_type") in ("t5", "mt5", "umt5")


def path_of(source: Source, part: Part | None = None) -> Path | None:
    """Return the path of a model; None for a published one that is not on this machine."""
    public = find_local(source)
    if not isinstance(public, PublicModel):
        return locate(source, part).path
    return _cached(public.repo, public.file)


def _cached(repo: str, file: str) -> Path | None:
    path = try_to_load_from_cache(repo, file)
    return Path(path) if isinstance(path, str) else None


def _summary(name: str, *parts: PartSummary, beside: int = 0, **more: Any) -> ModelSummary:
    """Return a summary with the sums over its parts, and the bytes of files ``beside`` them."""
    sizes = [part.disk_bytes for part in parts if part.disk_bytes is not None]
    return ModelSummary(
        name=name,
        parts=parts,
        parameters=sum(part.parameters or 0 for part in parts),
        disk_bytes=sum(sizes) + beside if sizes else None,
        memory={
            precision: sum(part.memory.get(precision, 0) for part in parts)
            for precision in parts[0].memory
        },
        **more,
    )


def _alone(name: str, part: PartSummary) -> ModelSummary:
    """Return the summary of a model that is no pipeline."""
    memory: dict[Precision, int] = {p: size for p, size in part.memory.items() if p != "int8"}
    return _summary(name, dataclasses.replace(part, memory=memory))


def _model(source: Source, part: Part) -> tuple[ImageTokenizer | Transformer, PartSummary]:
    """Return a model on the meta device, and its summary."""
    path, is_transformer = path_of(source, part), part == "transformer"
    model: ImageTokenizer | Transformer
    if path is not None:
        model = (load_transformer if is_transformer else load_tokenizer)(source, device="meta")
    else:
        public = find_local(source)
        assert isinstance(public, PublicModel)
        build: type[Any] = Transformer if is_transformer else ImageTokenizer
        with torch.device("meta"):
            model = build(public.config)
    count = model.parameter_count()
    memory, stored_as = _memory(count), None
    if isinstance(model, Transformer):
        stored_as = model.config.quantization
        own = copy.deepcopy(model)
        if stored_as is None:
            with torch.device("meta"):
                make_quantized(own)
        # Quantised layers, and all other weights in bfloat16.
        floats = sum(weight.numel() for weight in own.parameters())
        quantised = 2 * floats + sum(buffer.nbytes for buffer in own.buffers())
        memory = {**({} if stored_as else memory), "int8": quantised}
    files = [] if path is None else [path]
    if path is not None and path.is_dir():
        files = [path / CONFIG_NAME, *weight_files(path)]
    return model, PartSummary(
        kind=model.kind,
        parameters=count,
        disk_bytes=_bytes_of(files) if files else None,
        memory=memory,
        stored_as=None if path is None else stored_as or dtype_name(model.dtype),
        config=config_to_dict(model.config),
    )


def _text_encoder(source: str, *, required: bool = False) -> PartSummary:
    """Return the summary of a text encoder: a folder, or a hub repository that may be in the cache.

    InputError if a file is damaged, or there are no weights and they are ``required``.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir() and is_repo_id(source):
        folder = (_cached(source, CONFIG_NAME) or folder / CONFIG_NAME).parent
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        if required:
            raise InputError(f"{source} has no weights (*.safetensors); copy or download it again")
        return PartSummary(kind="text encoder")
    shapes = {name: shape for path in files for name, shape in safetensors_shapes(path).items()}
    if "shared.weight" in shapes:
        shapes.pop("encoder.embed_tokens.weight", None)  # the same weight
    # Of a whole T5 model, the encoder only: it is all that is loaded.
    own = ("encoder.", "shared.")
    parameters = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(own))
    _, read = next(iter(read_safetensors(files[0])))
    values = read_json(folder / CONFIG_NAME)
    known = {"dim": "d_model", "layers": "num_layers", "heads": "num_heads", "hidden_dim": "d_ff"}
    return PartSummary(
        kind="text encoder",
        parameters=parameters,
        disk_bytes=_bytes_of(folder.iterdir()),
        memory=_memory(parameters),
        stored_as=dtype_name(read().dtype),
        config={name: values[theirs] for name, theirs in known.items() if theirs in values},
    )


def _bytes_of(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def _memory(parameters: int) -> dict[Precision, int]:
    """Return the memory of weights that are never quantised."""
    return {"float32": 4 * parameters, "bfloat16": 2 * parameters, "int8": 2 * parameters}
