"""Loading of either model from a folder, a file or a name.

The configuration of a checkpoint file is inferred from the shapes of its weights and from the
arguments stored with them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from llamagen.backends.cpu.convolution import accelerate
from llamagen.checkpoints.published import Checkpoint
from llamagen.checkpoints.sources import Location, Source, locate
from llamagen.config import (
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

_log = logging.getLogger(__name__)


def load_tokenizer(
    source: Source, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> ImageTokenizer:
    """Load an image tokenizer; ``dtype`` None keeps the precision of its file.

    ``source`` is a model folder or the pipeline folder around it, a checkpoint file (.pt,
    .safetensors), a published name such as "vq-16", or a hub repository "owner/name".
    FileNotFoundError if a file of the folder is missing; InputError if there is no such model, it
    is another one, it is damaged, or it cannot be downloaded.
    """
    return _load(ImageTokenizer, locate(source, "tokenizer"), device, dtype)


def load_transformer(
    source: Source,
    *,
    grid: Grid | None = None,
    heads: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Transformer:
    """Load a transformer; see ``load_tokenizer``. InputError, too, if an argument contradicts it.

    A checkpoint file may not say the ``grid`` of codes that it was trained on (16 x 16 without it),
    and of no preset's size it does not say the number of query ``heads``.
    """
    return _load(Transformer, locate(source, "transformer"), device, dtype, grid, heads)


def load_model(
    source: Source,
    *,
    grid: Grid | None = None,
    heads: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> ImageTokenizer | Transformer:
    """Load whichever of the two models ``source`` is; arguments and errors as for the two."""
    found = locate(source)
    model = ImageTokenizer if found.kind == ImageTokenizer.kind else Transformer
    return _load(model, found, device, dtype, grid, heads)


def _load(
    model: type[Any],
    found: Location,
    device: torch.device | str,
    dtype: torch.dtype | None,
    grid: Grid | None = None,
    heads: int | None = None,
) -> Any:
    checkpoint, source = found.checkpoint, str(found.path)
    if checkpoint is None:
        config = model.read_config(found.path)
    elif checkpoint.kind != model.kind:
        raise InputError(
            f"{source} holds another model ({checkpoint.kind}), expected: {model.kind}"
        )
    elif found.public is not None:
        source, config = found.public.name, found.public.config
    elif model is ImageTokenizer:
        config = infer_tokenizer_config(checkpoint)
    else:
        config = infer_transformer_config(checkpoint, grid=grid, heads=heads)
    if isinstance(config, TransformerConfig):
        _agreed(source, "grid", None if grid is None else tuple(grid), config.grid)
        _agreed(source, "heads", heads, config.heads)
    if checkpoint is None:
        loaded = model.from_folder(found.path, device=device, dtype=dtype)
    else:
        loaded = model.from_tensors(
            config,
            checkpoint.tensors,
            shapes=checkpoint.shapes,
            source=checkpoint.source,
            device=device,
            dtype=dtype,
        )
    return accelerate(loaded) if isinstance(loaded, ImageTokenizer) else loaded


def infer_tokenizer_config(checkpoint: Checkpoint) -> TokenizerConfig:
    """Return the configuration of the image tokenizer in ``checkpoint``, of any size.

    Shapes do not tell whether the codebook is l2-normalised: it is, unless the stored arguments
    say otherwise. Nor do they tell the number of norm groups, which is 32. InputError if a weight
    that tells the size is missing or has an impossible shape.
    """
    size, count = checkpoint.size, checkpoint.count
    base = size("encoder.conv_in.weight", 0)
    widths = [
        size(f"encoder.conv_blocks.{level}.res.0.conv1.weight", 0)
        for level in range(count(r"encoder\.conv_blocks\.(\d+)\."))
    ]
    if any(width % base for width in widths):
        raise InputError(
            f"{checkpoint.source}: the encoder's levels have {widths} channels, expected multiples "
            f"of its first convolution's {base}"
        )
    values = {
        "codebook_size": size("quantize.embedding.weight", 0),
        "codebook_dim": size("quantize.embedding.weight", 1),
        "codebook_l2_norm": bool(checkpoint.arguments.get("codebook_l2_norm", True)),
        "base_channels": base,
        "channel_multipliers": tuple(width // base for width in widths),
        "encoder_blocks": count(r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        "decoder_blocks": count(r"decoder\.conv_blocks\.0\.res\.(\d+)\."),
        "z_channels": size("encoder.conv_out.weight", 0),
    }
    return config_from_dict(TokenizerConfig, values, checkpoint.source)


def infer_transformer_config(
    checkpoint: Checkpoint, *, grid: Grid | None = None, heads: int | None = None
) -> TransformerConfig:
    """Return the configuration of the transformer in ``checkpoint``, of any size.

    Shapes do not tell ``grid`` and ``heads``: by default they are those of the stored arguments,
    else 16 x 16, and the number of heads of the preset that has these shapes. InputError, too, if
    they contradict the stored arguments, or nothing tells the number of heads.
    """
    source, arguments, size = checkpoint.source, checkpoint.arguments, checkpoint.size
    dim = size("tok_embeddings.weight", 1)
    layers = checkpoint.count(r"layers\.(\d+)\.")
    ffn_dim = size("layers.0.feed_forward.w1.weight", 0)
    heads = _agreed(source, "heads", heads, _recorded_heads(arguments, dim))
    if heads is None:
        known = {(p.dim, p.layers, p.ffn_dim): p.heads for p in TRANSFORMER_PRESETS.values()}
        heads = known.get((dim, layers, ffn_dim))
    if heads is None:
        raise InputError(
            f"{source}: {layers} layers of width {dim} are no preset, and the number of heads "
            f"cannot be read from shapes; give it with `heads`"
        )
    grid = _agreed(source, "grid", grid, _recorded_grid(arguments))
    if grid is None:
        grid = TransformerConfig().grid
        _log.warning(
            "%s does not say what grid it was trained on; assuming %s (give another with `grid`)",
            source,
            _shown(grid),
        )
    kv_heads = _kv_heads(checkpoint, dim, heads)
    values = {
        "dim": dim,
        "layers": layers,
        "heads": heads,
        "kv_heads": None if kv_heads == heads else kv_heads,
        "hidden_dim": None if ffn_dim == swiglu_hidden_dim(dim) else ffn_dim,
        "codebook_size": size("tok_embeddings.weight", 0),
        "grid": grid,
        "qk_norm": "layers.0.attention.q_norm.weight" in checkpoint.shapes,
        "order": "random" if "pos_instruct_embeddings" in checkpoint.shapes else "raster",
        **_condition(checkpoint),
    }
    return config_from_dict(TransformerConfig, values, source)


def _condition(checkpoint: Checkpoint) -> dict[str, Any]:
    if (name := "cls_embedding.uncond_embedding") in checkpoint.shapes:
        length, dim = (checkpoint.size(name, axis) for axis in (0, 1))
        return {"condition": "text", "text_length": length, "text_dim": dim}
    rows = checkpoint.size("cls_embedding.embedding_table.weight", 0)
    if checkpoint.arguments.get("num_classes") == rows:
        raise InputError(
            f"{checkpoint.source} was trained without a row for no class, which guidance needs: it "
            f"has {rows} rows for {rows} classes; train it with class dropout"
        )
    return {"condition": "class", "num_classes": rows - 1}


def _kv_heads(checkpoint: Checkpoint, dim: int, heads: int) -> int:
    """Return the key and value heads: the fused projection has heads + 2 kv_heads of them."""
    rows = checkpoint.size("layers.0.attention.wqkv.weight", 0)
    if dim >= heads >= 1 and dim % heads == 0:
        kv_heads, rest = divmod(rows - dim, 2 * (dim // heads))
        if rest == 0 and kv_heads >= 1:
            return kv_heads
    raise InputError(
        f"{checkpoint.source}: {heads} heads do not fit a width of {dim} and an attention "
        f"projection of {rows} rows; give the number of heads that it was trained with (`heads`)"
    )


def _recorded_heads(arguments: Mapping[str, Any], dim: int) -> int | None:
    """Return the heads that stored arguments tell, by a number or a preset's name (GPT-B)."""
    if isinstance(heads := arguments.get("n_head"), int):
        return heads
    known = TRANSFORMER_PRESETS.get(str(arguments.get("gpt_model", "")).removeprefix("GPT-"))
    return known.heads if known is not None and known.dim == dim else None


def _recorded_grid(arguments: Mapping[str, Any]) -> Grid | None:
    size, factor = arguments.get("image_size"), arguments.get("downsample_size")
    if isinstance(size, int) and isinstance(factor, int) and size >= factor >= 1:
        return (size // factor, size // factor)
    return None


def _agreed(source: str, name: str, given: Any, known: Any) -> Any:
    """Return the caller's value or the known one, which must not differ if there are both."""
    if None not in (given, known) and given != known:
        raise InputError(
            f"{source} was trained with {name} {_shown(known)}, not {_shown(given)}; leave "
            f"`{name}` out"
        )
    return known if given is None else given


def _shown(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
