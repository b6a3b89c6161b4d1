"""Folders that vLLM loads: ``config.json``, ``generation_config.json``, ``model.safetensors``.

The weights have the transformer's own names; a folder for this machine only links to them.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import llamagen.support.storage as storage
from llamagen.checkpoints import resolve_pipeline
from llamagen.checkpoints.load import load_transformer
from llamagen.checkpoints.sources import Source, locate
from llamagen.config import (
    Grid,
    SamplingConfig,
    TransformerConfig,
    config_to_dict,
    non_default_fields,
    read_json,
)
from llamagen.models.pretrained import CONFIG_NAME, WEIGHTS_NAME
from llamagen.models.transformer import Transformer
from llamagen.models.transformer.quantization import refuse_quantized
from llamagen.support.devices import dtype_name
from llamagen.support.errors import InputError
from llamagen.support.weights import read_safetensors

if TYPE_CHECKING:
    from llamagen.vllm_plugin.hf_config import LlamaGenConfig

FIELDS = frozenset(
    {
        *("dim", "layers", "heads", "kv_heads", "hidden_dim", "codebook_size", "grid"),
        *("condition", "num_classes", "text_length", "text_dim", "rope_base", "norm_eps"),
        *("token_dropout", "attention_dropout", "residual_dropout", "ffn_dropout", "drop_path"),
    }
)
"""Fields that the plugin's model implements; it is refused if any other is not at its default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Capabilities of an engine."""

    guidance: bool = True
    """Serve requests with guidance. Without it a request costs half as much and has none."""
    negative_prompts: bool = False
    """Serve conditions that guidance leads away from, instead of "no class" or "no text". Texts
    then take more memory per request."""
    grid: Grid | None = None
    """Rows and columns of an image; by default those that the model was trained on."""
    sampling: SamplingConfig | None = None
    """Settings for requests that say nothing; by default the model's own."""


def export_for_vllm(
    source: Source | Transformer, out: Path | str, options: ExportOptions | None = None
) -> Path:
    """Write a folder that vLLM loads wherever this package is installed beside it; return it.

    ``source`` is a transformer, or whatever a pipeline can be loaded from. An older folder of this
    kind is replaced once the new one is complete. FileNotFoundError if a file of the source is
    missing; InputError if it is no transformer or damaged, or ``out`` holds something else.
    """
    out = Path(out).expanduser()
    if out.exists() and not is_exported(out) and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is no model folder for vLLM; choose another name")
    storage.require_writable(out.absolute().parent)
    with storage.atomic_folder(out) as folder:
        _fill(source, folder, options or ExportOptions(), link=False)
    return out


@contextmanager
def temporary_export(
    source: Source | Transformer, options: ExportOptions | None = None
) -> Iterator[Path]:
    """Yield a folder as ``export_for_vllm`` writes it; raises the same errors.

    Weights in a model folder are linked to; without ``options`` an exported one is yielded itself.
    """
    if options is None and not isinstance(source, Transformer) and is_exported(Path(source)):
        yield Path(source)
        return
    with TemporaryDirectory(prefix="llamagen-vllm-") as folder:
        _fill(source, Path(folder), options or ExportOptions(), link=True)
        yield Path(folder)


def is_exported(folder: Path) -> bool:
    """Whether ``folder`` was written by ``export_for_vllm``."""
    path = folder / CONFIG_NAME
    return path.is_file() and read_json(path).get("model_type") == "llamagen"


def read_exported(folder: Path | str) -> LlamaGenConfig:
    """Return the configuration of an exported folder; InputError if it is none, or damaged."""
    from llamagen.vllm_plugin.hf_config import LlamaGenConfig

    folder = Path(folder)
    if not is_exported(folder):
        raise InputError(
            f"{folder} is no model folder for vLLM; write one with llamagen export-vllm"
        )
    return LlamaGenConfig(**read_json(folder / CONFIG_NAME))


def _fill(
    source: Source | Transformer, folder: Path, options: ExportOptions, *, link: bool
) -> None:
    from llamagen.vllm_plugin.hf_config import LlamaGenConfig

    config, sampling = _place_weights(source, folder, link=link)
    if options.grid is not None:
        config = dataclasses.replace(config, grid=options.grid)
    sampling = options.sampling or sampling
    dtype = dict(read_safetensors(folder / WEIGHTS_NAME))["norm.weight"]().dtype
    exported = LlamaGenConfig(
        transformer=config_to_dict(config),
        streams=2 if options.guidance else 1,
        negative_prompts=options.negative_prompts,
        sampling=config_to_dict(sampling),
        dtype=dtype_name(dtype),
    )
    generation = {
        "max_new_tokens": config.num_codes,
        "eos_token_id": exported.end_id,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        **({"top_k": sampling.top_k} if sampling.top_k > 0 else {}),
    }
    storage.write_json(folder / CONFIG_NAME, exported.to_diff_dict())
    storage.write_json(folder / "generation_config.json", generation)


def _place_weights(
    source: Source | Transformer, folder: Path, *, link: bool
) -> tuple[TransformerConfig, SamplingConfig]:
    """Put the weights into ``folder``; return the model's configuration and own settings."""
    sampling, weights = SamplingConfig(), None
    if isinstance(source, Transformer):
        config = source.config
    elif is_exported(path := Path(source).expanduser()):
        exported = read_exported(path)
        config, sampling, weights = exported.model, exported.default_sampling, path / WEIGHTS_NAME
    else:
        found = resolve_pipeline(source)
        sampling, path = found.sampling or sampling, locate(found.transformer, "transformer").path
        if path.is_dir() and (path / WEIGHTS_NAME).is_file():
            config, weights = Transformer.read_config(path), path / WEIGHTS_NAME
        else:
            source = load_transformer(found.transformer)
            config = source.config
    refuse_quantized(config, "be exported for vLLM")
    if config.order == "random":
        raise InputError(
            "vLLM predicts codes one after another, and this transformer in random order; generate "
            "with engine 'native'"
        )
    unknown = non_default_fields(config, FIELDS)
    if unknown:
        raise InputError(
            f"vLLM's model does not implement {', '.join(unknown)} of this transformer; generate "
            f"with engine 'native'"
        )
    if weights is None:
        assert isinstance(source, Transformer)
        source.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
    elif link:
        (folder / WEIGHTS_NAME).symlink_to(weights.resolve())
    else:
        shutil.copyfile(weights, folder / WEIGHTS_NAME)
    return config, sampling
