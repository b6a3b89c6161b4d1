"""Write a model folder that vLLM loads by itself, for ``vllm serve`` and programs of one's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``llamagen export-vllm``."""

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


def run(options: Options) -> None:
    """Export, and print where the model is."""
    from llamagen.vllm_plugin.export import ExportOptions, export_for_vllm

    export = ExportOptions(
        guidance=options.guidance, negative_prompts=options.negative_prompts, grid=options.grid
    )
    print(export_for_vllm(options.model, options.out, export))
