"""Loading either model from wherever it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from llamagen.backends.cpu.convolution import accelerate
from llamagen.checkpoints.infer import infer_tokenizer_config, infer_transformer_config
from llamagen.checkpoints.names import PublicModel
from llamagen.checkpoints.published import Checkpoint, read_checkpoint
from llamagen.checkpoints.sources import Location, Source, folder_kind, locate
from llamagen.config import TOKENIZER_PRESETS, TRANSFORMER_PRESETS, Grid, TransformerConfig
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.models.transformer import Transformer
from llamagen.support.errors import InputError


def load_tokenizer(
    source: Source, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> ImageTokenizer:
    """Loads an image tokenizer.

    Args:
        source: a model folder or the pipeline folder around it, a checkpoint file (.pt,
            .safetensors), a published name such as "vq-16", or a hub repository "owner/name".
        device: where it goes.
        dtype: precision of the weights; None keeps the stored one.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        InputError: there is no such model, it is another one, it is damaged, or it cannot be
            downloaded.
    """
    return _tokenizer(_opened(locate(source, "tokenizer")), device, dtype)


def load_transformer(
    source: Source,
    *,
    grid: Grid | None = None,
    heads: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Transformer:
    """Loads a transformer.

    Args:
        source: as for ``load_tokenizer``; a published name such as "c2i-L-384".
        grid: rows and columns of codes that a checkpoint file was trained on, if the file does
            not say; without it 16 x 16.
        heads: number of query heads, for a checkpoint file that is of no preset's size.
        device: where it goes.
        dtype: precision of the weights; None keeps the stored one.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        InputError: there is no such model, it is another one, it is damaged, it cannot be
            downloaded, or ``grid`` or ``heads`` contradict it.
    """
    return _transformer(_opened(locate(source, "transformer")), grid, heads, device, dtype)


def load_model(
    source: Source,
    *,
    grid: Grid | None = None,
    heads: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> ImageTokenizer | Transformer:
    """Loads whichever of the two models ``source`` is; arguments and errors as for the two."""
    opened = _opened(locate(source))
    if opened.kind == ImageTokenizer.kind:
        return _tokenizer(opened, device, dtype)
    return _transformer(opened, grid, heads, device, dtype)


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A model that was found, with what is known of it before its weights are read."""

    folder: Path
    kind: str
    checkpoint: Checkpoint | None = None
    """Instead of a folder, an opened file."""
    public: PublicModel | None = None


def _opened(location: Location) -> _Opened:
    if location.path.is_dir():
        return _Opened(location.path, folder_kind(location.path))
    checkpoint = read_checkpoint(location.path)
    return _Opened(location.path, checkpoint.kind, checkpoint, location.public)


def _tokenizer(
    opened: _Opened, device: torch.device | str, dtype: torch.dtype | None
) -> ImageTokenizer:
    checkpoint = opened.checkpoint
    if checkpoint is None:
        return accelerate(ImageTokenizer.from_folder(opened.folder, device=device, dtype=dtype))
    _require_kind(checkpoint, ImageTokenizer.kind)
    if opened.public is None:
        config = infer_tokenizer_config(checkpoint)
    else:
        config = TOKENIZER_PRESETS[opened.public.preset]
    model = ImageTokenizer.from_tensors(
        config,
        checkpoint.tensors,
        shapes=checkpoint.shapes,
        source=checkpoint.source,
        device=device,
        dtype=dtype,
    )
    return accelerate(model)


def _transformer(
    opened: _Opened,
    grid: Grid | None,
    heads: int | None,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> Transformer:
    checkpoint = opened.checkpoint
    if checkpoint is None:
        config = Transformer.read_config(opened.folder)
        _require_same(config, grid, heads, str(opened.folder))
        return Transformer.from_folder(opened.folder, device=device, dtype=dtype)
    _require_kind(checkpoint, Transformer.kind)
    public = opened.public
    if public is None:
        config = infer_transformer_config(checkpoint, grid=grid, heads=heads)
    else:
        config = dataclasses.replace(
            TRANSFORMER_PRESETS[public.preset], condition=public.condition, grid=public.grid
        )
        _require_same(config, grid, heads, public.name)
    return Transformer.from_tensors(
        config,
        checkpoint.tensors,
        shapes=checkpoint.shapes,
        source=checkpoint.source,
        device=device,
        dtype=dtype,
    )


def _require_kind(checkpoint: Checkpoint, kind: str) -> None:
    if checkpoint.kind != kind:
        raise InputError(
            f"{checkpoint.source} holds another model ({checkpoint.kind}), expected: {kind}"
        )


def _require_same(
    config: TransformerConfig, grid: Grid | None, heads: int | None, source: str
) -> None:
    """Checks what the caller says against a configuration that is known."""
    if grid is not None and tuple(grid) != config.grid:
        raise InputError(
            f"{source} was trained with grid {config.grid[0]}x{config.grid[1]}, not "
            f"{grid[0]}x{grid[1]}; leave `grid` out"
        )
    if heads is not None and heads != config.heads:
        raise InputError(f"{source} has {config.heads} heads, not {heads}; leave `heads` out")
