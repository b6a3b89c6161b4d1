"""``llamagen export`` and ``llamagen export-vllm``: model folders of runs, and for vLLM."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro


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
    """The running mean (EMA) or the weights as they are trained; auto takes the mean if there is
    one."""
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


def run(options: Run | Vllm) -> None:
    """Export, and print where the model is."""
    if isinstance(options, Run):
        from llamagen.training.export import export_run

        print(export_run(**vars(options)))
        return
    from llamagen.vllm_plugin.export import ExportOptions, export_for_vllm

    export = ExportOptions(
        guidance=options.guidance, negative_prompts=options.negative_prompts, grid=options.grid
    )
    print(export_for_vllm(options.model, options.out, export))
