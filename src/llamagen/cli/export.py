"""Write the model folder of a training run's checkpoint, also while the run goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``llamagen export``."""

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


def run(options: Options) -> None:
    """Export, and print where the model is."""
    from llamagen.training.export import export_run

    model = export_run(
        options.run,
        options.out,
        step=options.step,
        weights=options.weights,
        tokenizer=options.tokenizer,
    )
    print(model)
