"""Describe a model, a checkpoint or a generated image; without a name, list what is known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import tyro

from llamagen.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``llamagen info``."""

    source: tyro.conf.Positional[str | None] = None
    """Name, folder, checkpoint file, hub repository, or a PNG made by llamagen."""


def run(options: Options) -> None:
    """Prints the description."""
    if options.source is None:
        print(_overview())
    elif Path(options.source).suffix.lower() == ".png":
        from llamagen.pictures import read_metadata

        print(json.dumps(read_metadata(options.source), indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(_describe(options.source)))


def _overview() -> str:
    from llamagen.checkpoints import PUBLIC_MODELS, shipped_models
    from llamagen.config import TOKENIZER_PRESETS, TRANSFORMER_PRESETS

    lines = ["transformer presets (layers, heads, dim):"]
    lines += [
        f"  {name:<5} {c.layers:>3} {c.heads:>3} {c.dim:>5}"
        for name, c in TRANSFORMER_PRESETS.items()
    ]
    lines += ["", "image tokenizer presets (downsampling, codes):"]
    lines += [
        f"  {name:<5} {c.downsampling:>3} {c.codebook_size:>6}"
        for name, c in TOKENIZER_PRESETS.items()
    ]
    lines += ["", "models that come with the package (names for --model):"]
    lines += [f"  {name}" for name in shipped_models()]
    lines += ["", "published models (names for --model and --tokenizer):"]
    lines += [f"  {m.name:<12} {m.kind:<16} {m.repo}/{m.file}" for m in PUBLIC_MODELS]
    return "\n".join(lines)


def _describe(source: str) -> list[str]:
    """One paragraph per model found in ``source``."""
    from llamagen import checkpoints

    try:
        found = checkpoints.resolve_pipeline(source)
    except InputError as error:
        # A tokenizer on its own is no pipeline, but can be described all the same.
        try:
            return [_describe_tokenizer(source)]
        except InputError:
            raise error from None
    parts = [f"model: {found.name}", _describe_transformer(found.transformer)]
    if found.tokenizer is not None:
        parts.append(_describe_tokenizer(found.tokenizer))
    if found.labels is not None:
        parts.append(f"classes: {len(found.labels)} ({', '.join(found.labels.names[:5])}, ...)")
    if found.text is not None:
        length, cleaned = found.text.max_length, "cleaned" if found.text.clean else "as they are"
        parts.append(f"text encoder: {found.text.encoder}, {length} tokens, captions {cleaned}")
    sampling = dataclasses.asdict(found.sampling)
    parts.append("sampling: " + ", ".join(f"{name} {value}" for name, value in sampling.items()))
    return parts


def _describe_transformer(source: str | Path) -> str:
    from llamagen.checkpoints import load_transformer

    model = load_transformer(source)
    config = model.config
    rows, columns = config.grid
    return _paragraph(
        "transformer",
        {
            "parameters": f"{model.parameter_count():,}",
            "memory": _memory(model.parameter_count()),
            "layers, heads, dim": f"{config.layers}, {config.heads}, {config.dim}",
            "condition": config.condition,
            "grid": f"{rows} x {columns} = {config.num_codes} codes of {config.codebook_size}",
            "stored as": config.quantization or str(model.dtype).removeprefix("torch."),
        },
    )


def _describe_tokenizer(source: str | Path) -> str:
    from llamagen.checkpoints import load_tokenizer

    model = load_tokenizer(source)
    config = model.config
    return _paragraph(
        "image tokenizer",
        {
            "parameters": f"{model.parameter_count():,}",
            "memory": _memory(model.parameter_count()),
            "downsampling": config.downsampling,
            "codebook": f"{config.codebook_size} x {config.codebook_dim}",
            "stored as": str(model.dtype).removeprefix("torch."),
        },
    )


def _memory(parameters: int) -> str:
    mib = parameters / 2**20
    return f"{4 * mib:,.0f} MiB in float32, {2 * mib:,.0f} MiB in bfloat16 or float16"


def _paragraph(title: str, rows: dict[str, Any]) -> str:
    return "\n".join([f"{title}:", *(f"  {name}: {value}" for name, value in rows.items())])
