"""Summary of a model: architecture, size on disk and in memory, settings.

Names and shapes of weights are read, never the weights.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

import llamagen.checkpoints as checkpoints
from llamagen.checkpoints.load import public_config
from llamagen.checkpoints.sources import Part, Source, locate
from llamagen.config import (
    TOKENIZER_PRESETS,
    Grid,
    SamplingConfig,
    TextConfig,
    config_to_dict,
    read_json,
)
from llamagen.models.pretrained import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    is_repo_id,
    read_safetensors,
    safetensors_shapes,
)
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.models.transformer import KVCache, Transformer
from llamagen.models.transformer.quantization import make_quantized
from llamagen.support.errors import InputError

Precision = Literal["float32", "bfloat16", "int8"]
"""Of the transformer's weights; with int8 all other weights are bfloat16."""

_T5_FAMILY = ("t5", "mt5", "umt5")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartSummary:
    """One model of a pipeline, or a model on its own."""

    kind: Literal["transformer", "image tokenizer", "text encoder"]
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
    """Rows and columns of codes."""
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
    """Return the summary of a model.

    A published model that is not on this machine is described by what is known of it, and not
    downloaded; a hub repository is.

    Args:
        source: a pipeline folder, a transformer, an image tokenizer or a text encoder (folder,
            checkpoint file), a name, or a hub repository.

    Raises:
        FileNotFoundError: a file of the model is missing.
        InputError: there is no such model, or it is damaged.
    """
    path = Path(source).expanduser()
    if is_text_encoder(path):
        return _alone(path.resolve().name, _text_encoder(str(path), required=True))
    try:
        found = checkpoints.resolve_pipeline(source)
    except InputError as error:
        # A tokenizer on its own is no pipeline, but can be described all the same.
        try:
            _, part = _model(source, "tokenizer")
        except InputError:
            raise error from None
        return _alone(_name(source), part)
    transformer, part = _model(found.transformer, "transformer")
    assert isinstance(transformer, Transformer)
    config = transformer.config
    parts, factor = [part], None
    if found.tokenizer is not None:
        tokenizer, part = _model(found.tokenizer, "tokenizer")
        assert isinstance(tokenizer, ImageTokenizer)
        parts.append(part)
        factor = tokenizer.config.downsampling
    if found.text is not None:
        parts.append(_text_encoder(found.text.encoder))
    is_class = config.condition == "class"
    return ModelSummary(
        name=found.name,
        parts=tuple(parts),
        parameters=sum(part.parameters or 0 for part in parts),
        disk_bytes=_disk_bytes(parts, found.folder),
        memory={
            precision: sum(part.memory.get(precision, 0) for part in parts)
            for precision in parts[0].memory
        },
        kv_cache={
            dtype_name(dtype): 2 * _sequence_bytes(transformer, dtype)
            for dtype in (torch.float32, torch.bfloat16, torch.int8)
        },
        grid=config.grid,
        codes=config.num_codes,
        image_size=None if factor is None else (factor * config.grid[0], factor * config.grid[1]),
        condition=config.condition,
        classes=config.num_classes if is_class else None,
        class_names=found.labels.names if found.labels is not None and is_class else (),
        text=found.text,
        sampling=found.sampling,
    )


def _alone(name: str, part: PartSummary) -> ModelSummary:
    """Return the summary of a model that is no pipeline."""
    floats: tuple[Precision, ...] = ("float32", "bfloat16")
    memory = {precision: part.memory[precision] for precision in floats if part.memory}
    return ModelSummary(
        name=name,
        parts=(dataclasses.replace(part, memory=memory),),
        parameters=part.parameters or 0,
        disk_bytes=part.disk_bytes,
        memory=memory,
    )


def _name(source: Source) -> str:
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else str(source)


def _model(source: Source, part: Part) -> tuple[ImageTokenizer | Transformer, PartSummary]:
    """Return a model on the meta device, and its summary."""
    public, path = _public(source), path_of(source, part)
    model: ImageTokenizer | Transformer
    if public is None or path is not None:
        is_transformer = part == "transformer"
        load = checkpoints.load_transformer if is_transformer else checkpoints.load_tokenizer
        model = load(source, device="meta")
    else:
        with torch.device("meta"):
            if part == "transformer":
                model = Transformer(public_config(public))
            else:
                model = ImageTokenizer(TOKENIZER_PRESETS[public.preset])
    if isinstance(model, Transformer):
        memory, stored_as = _transformer_memory(model), model.config.quantization
    else:
        memory, stored_as = _float_memory(model.parameter_count()), None
    return model, PartSummary(
        kind="transformer" if part == "transformer" else "image tokenizer",
        parameters=model.parameter_count(),
        disk_bytes=None if path is None else _size(path),
        memory=memory,
        stored_as=None if path is None else stored_as or dtype_name(model.dtype),
        config=config_to_dict(model.config),
    )


def _text_encoder(source: str, *, required: bool = False) -> PartSummary:
    """Return the summary of a text encoder: a folder, or a hub repository that may be in the cache.

    Raises:
        InputError: a file is damaged, or there are no weights and they are ``required``.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir() and is_repo_id(source):
        cached = try_to_load_from_cache(source, CONFIG_NAME)
        folder = Path(cached).parent if isinstance(cached, str) else folder
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        if required:
            raise InputError(f"{source} has no weights (*.safetensors); copy or download it again")
        return PartSummary(kind="text encoder")
    shapes = {name: shape for path in files for name, shape in safetensors_shapes(path).items()}
    if "shared.weight" in shapes:
        shapes.pop("encoder.embed_tokens.weight", None)  # the same weight
    # Of a whole T5 model, the encoder only: it is all that is loaded.
    own = [s for name, s in shapes.items() if name.startswith(("encoder.", "shared."))]
    parameters = sum(torch.Size(shape).numel() for shape in own)
    _, read = next(iter(read_safetensors(files[0])))
    values = read_json(folder / CONFIG_NAME)
    known = {"dim": "d_model", "layers": "num_layers", "heads": "num_heads", "hidden_dim": "d_ff"}
    return PartSummary(
        kind="text encoder",
        parameters=parameters,
        disk_bytes=_bytes_of(path for path in folder.iterdir() if path.is_file()),
        memory=_float_memory(parameters),
        stored_as=dtype_name(read().dtype),
        config={name: values[theirs] for name, theirs in known.items() if theirs in values},
    )


def is_text_encoder(path: Path) -> bool:
    """Return whether a folder holds a text encoder of the T5 family."""
    file = path / CONFIG_NAME
    return file.is_file() and read_json(file).get("model_type") in _T5_FAMILY


def _public(source: Source) -> checkpoints.PublicModel | None:
    """Return the published model that ``source`` names, unless it is a path."""
    if isinstance(source, Path) or Path(source).expanduser().exists():
        return None
    return checkpoints.find_public(source)


def path_of(source: Source, part: Part | None = None) -> Path | None:
    """Return the path of a model; None for a published one that is not on this machine."""
    public = _public(source)
    if public is None:
        return locate(source, part).path
    cached = try_to_load_from_cache(public.repo, public.file)
    return Path(cached) if isinstance(cached, str) else None


def _size(path: Path) -> int:
    """Return the bytes of a checkpoint file, or of a model folder's files."""
    return _bytes_of([path / CONFIG_NAME, path / WEIGHTS_NAME] if path.is_dir() else [path])


def _disk_bytes(parts: Sequence[PartSummary], folder: Path | None) -> int | None:
    known = [part.disk_bytes for part in parts if part.disk_bytes is not None]
    if not known:
        return None
    # Index, class names, model card.
    rest = () if folder is None else folder.iterdir()
    return sum(known) + _bytes_of(path for path in rest if path.is_file())


def _bytes_of(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _float_memory(parameters: int) -> dict[Precision, int]:
    """Return the memory of weights that are never quantised."""
    half = 2 * parameters
    return {"float32": 4 * parameters, "bfloat16": half, "int8": half}


def _transformer_memory(model: Transformer) -> dict[Precision, int]:
    """Return the memory of a transformer on the meta device, in each precision."""
    if model.config.quantization is not None:
        return {"int8": _quantized_bytes(model)}
    count = model.parameter_count()
    found: dict[Precision, int] = {"float32": 4 * count, "bfloat16": 2 * count}
    own = copy.deepcopy(model)
    with torch.device("meta"):
        make_quantized(own)
    found["int8"] = _quantized_bytes(own)
    return found


def _quantized_bytes(model: nn.Module) -> int:
    """Return the bytes of quantised layers, and of all other weights in bfloat16."""
    return 2 * sum(p.numel() for p in model.parameters()) + sum(b.nbytes for b in model.buffers())


def _sequence_bytes(model: Transformer, dtype: torch.dtype) -> int:
    config = model.config
    return KVCache.bytes_per_sequence(config, config.condition_length + config.num_codes, dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a precision, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
