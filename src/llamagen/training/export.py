"""Model folders from the checkpoints of a run, at any time and without its data."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn

import llamagen.support.storage as storage
from llamagen.checkpoints import load_tokenizer
from llamagen.config import TokenizerConfig, config_from_dict
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.support.errors import InputError
from llamagen.training.checkpoint import CHECKPOINTS_NAME, Checkpoint, read_checkpoint
from llamagen.training.config import TokenizerTraining, TransformerTraining
from llamagen.training.recipes import load_recipe
from llamagen.training.run_folder import RECIPE_NAME
from llamagen.training.transformer_start import start_of

Weights = Literal["auto", "mean", "trained"]
"""The running mean (EMA), the weights as they are trained, or the mean if there is one."""


def export_run(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    weights: Weights = "auto",
    tokenizer: str | None = None,
) -> Path:
    """Write the model folder of a run's checkpoint; the run is only read and may be going on.

    ``step`` is that of the checkpoint, by default the latest; ``tokenizer`` the image tokenizer of
    a transformer, if it is not where the recipe says. Raises FileNotFoundError if there is no such
    run, InputError if there is no such checkpoint, or it has no such weights, or ``out`` is in use.
    """
    path = run / RECIPE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{run} is no run: it has no {RECIPE_NAME}; name a run's folder")
    checkpoint = read_checkpoint(run / CHECKPOINTS_NAME, step)
    about = checkpoint.about["model"]
    if about["kind"] == ImageTokenizer.kind:
        model = ImageTokenizer(config_from_dict(TokenizerConfig, about["config"], "checkpoint"))
        _read(checkpoint, model, weights, load_recipe(TokenizerTraining, path).loop.ema_decay)
        storage.require_writable(out.parent)
        model.save_pretrained(out)
        return out
    recipe = load_recipe(TransformerTraining, path)
    source = tokenizer or recipe.tokenizer or recipe.init
    if source is None:
        raise InputError("no image tokenizer is known; name the one of this run (`tokenizer`)")
    start = start_of(recipe, about, str(checkpoint.path))
    with torch.device("meta"):
        empty = start.build()
    saved = empty.to_empty(device="cpu").saved
    _read(checkpoint, saved, weights, recipe.loop.ema_decay)
    whole = start.whole(saved.state_dict())
    start.pipeline(load_tokenizer(source, dtype=torch.float32), whole).save_pretrained(out)
    return out


@torch.no_grad()
def _read(checkpoint: Checkpoint, model: nn.Module, weights: Weights, ema_decay: float) -> None:
    """Fill ``model`` with the weights of a checkpoint."""
    if weights == "mean" and ema_decay == 0:
        raise InputError(f"{checkpoint.path} has no running mean (ema_decay 0); export 'trained'")
    checkpoint.read_tensors({"model": model.state_dict()})
    if ema_decay > 0 and weights != "trained":
        means = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        checkpoint.read_tensors({"ema": means})
