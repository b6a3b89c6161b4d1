"""Train a transformer on images in class folders. The same command again goes on with a run."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from llamagen.cli.recipes import options_from_recipe, run_training
from llamagen.training.config import TransformerTraining


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``llamagen train transformer``."""

    recipe: str | None = None
    """YAML file, or a recipe that comes with the package (cifar10-transformer, digits-transformer);
    the other options change it."""
    preset: str | None = None
    """Published model, B, L, XL, XXL, XXXL, 1B, 3B or 7B; the options for its fields change it."""
    dry_run: bool = False
    """Only say how large the run is, how much memory it needs and what data it finds, and take two
    steps to see how fast it is. Nothing is written."""
    training: Annotated[TransformerTraining, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=TransformerTraining
    )


def defaults(arguments: list[str]) -> tuple[Options, list[str]]:
    """Takes --recipe and --preset off the arguments; returns what they mean, and the rest."""
    recipe, preset, training, rest = options_from_recipe(TransformerTraining, arguments)
    return Options(recipe=recipe, preset=preset, training=training), rest


def run(options: Options) -> None:
    """Trains, and says where the model is."""
    if options.dry_run:
        from llamagen.training.dry_run import dry_run

        dry_run(options.training)
        return
    from llamagen.training import train_transformer

    run_training(lambda: train_transformer(options.training))
