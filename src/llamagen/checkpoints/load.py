"""Loading either model from wherever it is."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import torch

from llamagen.backends.cpu.convolution import accelerate
from llamagen.checkpoints.names import PublicModel
from llamagen.checkpoints.published import Checkpoint, read_checkpoint
from llamagen.checkpoints.sources import Location, Source, folder_kind, locate
from llamagen.config import (
    TOKENIZER_PRESETS,
    TRANSFORMER_PRESETS,
    Grid,
    TokenizerConfig,
    TransformerConfig,
    config_from_dict,
    swiglu_hidden_dim,
)
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


_log = logging.getLogger(__name__)


def infer_tokenizer_config(checkpoint: Checkpoint) -> TokenizerConfig:
    """The configuration of the image tokenizer in ``checkpoint``, of whatever size.

    Whether the codebook is l2-normalised leaves no trace in the shapes: it is, unless the stored
    arguments say otherwise. Nor does the number of norm groups, which is 32.

    Raises:
        InputError: a weight that tells the size is missing or has an impossible shape.
    """
    base = _size(checkpoint, "encoder.conv_in.weight", 0)
    widths = [
        _size(checkpoint, f"encoder.conv_blocks.{level}.res.0.conv1.weight", 0)
        for level in range(_count(checkpoint, r"encoder\.conv_blocks\.(\d+)\."))
    ]
    if any(width % base for width in widths):
        raise InputError(
            f"{checkpoint.source}: the encoder's levels have {widths} channels, expected multiples "
            f"of its first convolution's {base}"
        )
    values = {
        "codebook_size": _size(checkpoint, "quantize.embedding.weight", 0),
        "codebook_dim": _size(checkpoint, "quantize.embedding.weight", 1),
        "codebook_l2_norm": bool(checkpoint.arguments.get("codebook_l2_norm", True)),
        "base_channels": base,
        "channel_multipliers": tuple(width // base for width in widths),
        "encoder_blocks": _count(checkpoint, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        "decoder_blocks": _count(checkpoint, r"decoder\.conv_blocks\.0\.res\.(\d+)\."),
        "z_channels": _size(checkpoint, "encoder.conv_out.weight", 0),
    }
    return config_from_dict(TokenizerConfig, values, checkpoint.source)


def infer_transformer_config(
    checkpoint: Checkpoint, *, grid: Grid | None = None, heads: int | None = None
) -> TransformerConfig:
    """The configuration of the transformer in ``checkpoint``, of whatever size.

    Args:
        checkpoint: the weights.
        grid: rows and columns of codes that it was trained on, which shapes do not tell; by
            default what the stored arguments say, else 16 x 16.
        heads: number of query heads, which shapes do not tell either; by default what the stored
            arguments say, else those of the preset that has these shapes.

    Raises:
        InputError: a weight that tells the size is missing or has an impossible shape, ``grid`` or
            ``heads`` contradict the stored arguments, or nothing tells the number of heads.
    """
    dim = _size(checkpoint, "tok_embeddings.weight", 1)
    layers = _count(checkpoint, r"layers\.(\d+)\.")
    ffn_dim = _size(checkpoint, "layers.0.feed_forward.w1.weight", 0)
    heads = _agreed(checkpoint, "heads", heads, _recorded_heads(checkpoint, dim))
    if heads is None:
        heads = _preset_heads(checkpoint, dim, layers, ffn_dim)
    grid = _agreed(checkpoint, "grid", grid, _recorded_grid(checkpoint.arguments))
    if grid is None:
        grid = TransformerConfig().grid
        _log.warning(
            "%s does not say what grid it was trained on; assuming %s (give another with `grid`)",
            checkpoint.source,
            _shown(grid),
        )
    kv_heads = _kv_heads(checkpoint, dim, heads)
    values = {
        "dim": dim,
        "layers": layers,
        "heads": heads,
        "kv_heads": None if kv_heads == heads else kv_heads,
        "hidden_dim": None if ffn_dim == swiglu_hidden_dim(dim) else ffn_dim,
        "codebook_size": _size(checkpoint, "tok_embeddings.weight", 0),
        "grid": grid,
        "qk_norm": "layers.0.attention.q_norm.weight" in checkpoint.shapes,
        **_condition(checkpoint),
    }
    return config_from_dict(TransformerConfig, values, checkpoint.source)


def _condition(checkpoint: Checkpoint) -> dict[str, Any]:
    if "cls_embedding.uncond_embedding" in checkpoint.shapes:
        return {
            "condition": "text",
            "text_length": _size(checkpoint, "cls_embedding.uncond_embedding", 0),
            "text_dim": _size(checkpoint, "cls_embedding.uncond_embedding", 1),
        }
    rows = _size(checkpoint, "cls_embedding.embedding_table.weight", 0)
    if checkpoint.arguments.get("num_classes") == rows:
        raise InputError(
            f"{checkpoint.source} was trained without a row for no class, which guidance needs: it "
            f"has {rows} rows for {rows} classes; train it with class dropout"
        )
    return {"condition": "class", "num_classes": rows - 1}


def _kv_heads(checkpoint: Checkpoint, dim: int, heads: int) -> int:
    """Key and value heads, from the rows of the fused projection: heads + 2 kv_heads of them."""
    rows = _size(checkpoint, "layers.0.attention.wqkv.weight", 0)
    if dim >= heads >= 1 and dim % heads == 0:
        total, rest = divmod(rows, dim // heads)
        kv_heads, odd = divmod(total - heads, 2)
        if rest == 0 and odd == 0 and kv_heads >= 1:
            return kv_heads
    raise InputError(
        f"{checkpoint.source}: {heads} heads do not fit a width of {dim} and an attention "
        f"projection of {rows} rows; give the number of heads that it was trained with (`heads`)"
    )


def _recorded_heads(checkpoint: Checkpoint, dim: int) -> int | None:
    """Heads that the stored arguments tell, by a number or by a preset's name such as GPT-B."""
    heads = checkpoint.arguments.get("n_head")
    if isinstance(heads, int):
        return heads
    name = str(checkpoint.arguments.get("gpt_model", "")).removeprefix("GPT-")
    known = TRANSFORMER_PRESETS.get(name)
    return known.heads if known is not None and known.dim == dim else None


def _preset_heads(checkpoint: Checkpoint, dim: int, layers: int, ffn_dim: int) -> int:
    for known in TRANSFORMER_PRESETS.values():
        if (known.dim, known.layers, known.ffn_dim) == (dim, layers, ffn_dim):
            return known.heads
    raise InputError(
        f"{checkpoint.source}: {layers} layers of width {dim} are no preset, and the number of "
        f"heads cannot be read from shapes; give it with `heads`"
    )


def _recorded_grid(arguments: Any) -> Grid | None:
    size, factor = arguments.get("image_size"), arguments.get("downsample_size")
    if isinstance(size, int) and isinstance(factor, int) and size >= factor >= 1:
        return (size // factor, size // factor)
    return None


def _agreed(checkpoint: Checkpoint, name: str, given: Any, recorded: Any) -> Any:
    """What the caller or the stored arguments say, which must not differ if both do."""
    if given is not None and recorded is not None and given != recorded:
        raise InputError(
            f"{checkpoint.source} was trained with {name} {_shown(recorded)}, not {_shown(given)}; "
            f"leave `{name}` out"
        )
    return recorded if given is None else given


def _shown(value: Any) -> str:
    return f"{value[0]}x{value[1]}" if isinstance(value, tuple) else str(value)


def _size(checkpoint: Checkpoint, name: str, axis: int) -> int:
    """Length of one axis of a weight."""
    shape = checkpoint.shapes.get(name)
    if shape is None or len(shape) <= axis or shape[axis] < 1:
        found = "is missing" if shape is None else f"has shape {shape}"
        raise InputError(f"{checkpoint.source}: not this {checkpoint.kind}: weight {name} {found}")
    return shape[axis]


def _count(checkpoint: Checkpoint, pattern: str) -> int:
    """Number of modules in a list: how many indices ``pattern`` captures.

    If some are left out, the weights of the last are missing from the model that is then expected.
    """
    found = (re.match(pattern, name) for name in checkpoint.shapes)
    return len({match[1] for match in found if match is not None})
