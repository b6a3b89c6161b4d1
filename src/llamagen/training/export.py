"""Model folders from the checkpoints of a run, at any time and without its data."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import llamagen.support.storage as storage
from llamagen.checkpoints import load_tokenizer
from llamagen.config import TokenizerConfig, config_from_dict
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.support.errors import InputError
from llamagen.training.checkpoint import Checkpoint, read_checkpoint
from llamagen.training.config import TokenizerTraining, TransformerTraining
from llamagen.training.recipes import load_recipe
from llamagen.training.run_folder import RECIPE_NAME, checkpoint_folder
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
    """Writes the model folder of a run's checkpoint; the run is only read and may be going on.

    Args:
        run: the run's folder.
        out: where the model goes: a tokenizer's folder or a pipeline's.
        step: of the checkpoint; by default the latest.
        weights: which.
        tokenizer: the image tokenizer of a transformer, if it is not where the recipe says.

    Raises:
        FileNotFoundError: there is no such run.
        InputError: there is no such checkpoint, it has no such weights, or ``out`` is in use.
    """
    if not (run / RECIPE_NAME).is_file():
        raise FileNotFoundError(f"{run} is no run: it has no {RECIPE_NAME}; name a run's folder")
    checkpoint = read_checkpoint(checkpoint_folder(run), step)
    if checkpoint.about["model"]["kind"] == ImageTokenizer.kind:
        _export_tokenizer(checkpoint, out, weights)
    else:
        recipe = load_recipe(TransformerTraining, run / RECIPE_NAME)
        _export_pipeline(checkpoint, recipe, out, weights, tokenizer)
    return out


def _export_tokenizer(checkpoint: Checkpoint, out: Path, weights: Weights) -> None:
    config = config_from_dict(TokenizerConfig, checkpoint.about["model"]["config"], "checkpoint")
    recipe = load_recipe(TokenizerTraining, checkpoint.path.parents[1] / RECIPE_NAME)
    model = ImageTokenizer(config)
    _read(checkpoint, model, _has_mean(recipe, weights, checkpoint))
    storage.require_writable(out.parent)
    model.save_pretrained(out)


def _export_pipeline(
    checkpoint: Checkpoint,
    recipe: TransformerTraining,
    out: Path,
    weights: Weights,
    tokenizer: str | None,
) -> None:
    source = tokenizer or recipe.tokenizer or recipe.init
    if source is None:
        raise InputError("no image tokenizer is known; name the one of this run (`tokenizer`)")
    start = start_of(recipe, checkpoint.about["model"], str(checkpoint.path))
    model = start.build_empty()
    _read(checkpoint, model.saved, _has_mean(recipe, weights, checkpoint))
    whole = start.whole(model.saved.state_dict())
    start.pipeline(load_tokenizer(source, dtype=torch.float32), whole).save_pretrained(out)


def _has_mean(
    recipe: TokenizerTraining | TransformerTraining, weights: Weights, checkpoint: Checkpoint
) -> bool:
    """Whether it is the running mean that is wanted."""
    there = recipe.loop.ema_decay > 0
    if weights == "mean" and not there:
        raise InputError(f"{checkpoint.path} has no running mean (ema_decay 0); export 'trained'")
    return there and weights != "trained"


@torch.no_grad()
def _read(checkpoint: Checkpoint, model: nn.Module, mean: bool) -> None:
    checkpoint.read_tensors({"model": model.state_dict()})
    if mean:
        trained: dict[str, Tensor] = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        means = {name: torch.empty_like(parameter) for name, parameter in trained.items()}
        checkpoint.read_tensors({"ema": means})
        for name, parameter in trained.items():
            parameter.copy_(means[name])
