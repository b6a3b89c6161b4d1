"""``llamagen train``: recipes as starting points for flags, training, a summary."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Annotated, Any, ClassVar, Self

import tyro

from llamagen.config import SamplingConfig
from llamagen.support.errors import InputError
from llamagen.support.launch import Launch
from llamagen.training.config import TokenizerTraining, TransformerTraining
from llamagen.training.recipes import load_recipe, preset_model

# Flags of nested fields have no prefix, and the loop has --steps of its own.
_STEPS = Annotated[int | None, tyro.conf.arg(name="sampling-steps")]
SamplingConfig.__annotations__["steps"] = _STEPS

_INTERRUPTED = 130
_SHOWN = ("psnr", "codebook_usage", "bits_per_code")
"""Metrics of the summary."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """Options of both commands."""

    recipe: str | None = None
    """YAML file, or a recipe that comes with the package (digits-tokenizer, digits-transformer);
    the other options change it."""
    preset: str | None = None
    """Published model: VQ-16, VQ-8; B, L, XL, XXL, XXXL, 1B, 3B, 7B. The options for its fields
    change it."""
    dry_run: bool = False
    """Only say how large the run is, how much memory it needs and what data it finds, and take two
    steps to see how fast it is. Nothing is written."""

    kind: ClassVar[Any]
    """Type of ``training``."""
    training: Any

    @classmethod
    def defaults(cls, arguments: list[str]) -> tuple[Self, list[str]]:
        """Take --recipe and --preset off the arguments; return their options, and the rest."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("--recipe")
        parser.add_argument("--preset")
        try:
            given, rest = parser.parse_known_args(arguments)
        except argparse.ArgumentError as error:
            raise InputError(f"{error.argument_name} needs a value") from error
        recipe, preset = given.recipe, given.preset
        training = cls.kind() if recipe is None else load_recipe(cls.kind, recipe)
        if preset is not None:
            training = dataclasses.replace(training, model=preset_model(cls.kind, preset))
        return cls(recipe=recipe, preset=preset, training=training), rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer(_Options):
    """Train an image tokenizer on a folder of images. The same command again resumes a run."""

    kind = TokenizerTraining
    training: Annotated[TokenizerTraining, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=TokenizerTraining
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transformer(_Options):
    """Train a transformer on images in class folders. The same command again resumes a run."""

    kind = TransformerTraining
    training: Annotated[TransformerTraining, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=TransformerTraining
    )


def run(options: Tokenizer | Transformer) -> None:
    """Train, print a summary, and end with one line on Ctrl-C."""
    if options.dry_run:
        from llamagen.training.dry_run import dry_run

        dry_run(options.training)
        return
    from llamagen.support.devices import keep_freed_memory
    from llamagen.training import TrainingInterrupted, train_tokenizer, train_transformer

    keep_freed_memory()
    train: Any = train_tokenizer if isinstance(options, Tokenizer) else train_transformer
    try:
        result = train(options.training)
    except TrainingInterrupted as stop:
        print(f"llamagen: {stop}", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    if Launch.current().rank > 0:
        return
    summary = [
        f"{split} {name.replace('_', ' ')} {value:.4g}"
        for split, values in (("training", result.train), ("validation", result.validation))
        for name, value in values.items()
        if name in _SHOWN
    ]
    print(f"{result.steps} steps in {result.seconds:.0f} s: {', '.join(summary)}")
    if result.skipped:
        print(f"{result.skipped} files could not be read; see {result.out / 'skipped.txt'}")
    print(result.model)
