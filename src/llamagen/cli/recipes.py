"""What the training commands share: recipes as starting points for flags, and the way they end."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from llamagen.support.errors import InputError
from llamagen.support.launch import Launch
from llamagen.training.config import TokenizerTraining, TransformerTraining
from llamagen.training.recipes import load_recipe, preset_model

if TYPE_CHECKING:
    from llamagen.training.loop import TrainingResult

RecipeT = TypeVar("RecipeT", TokenizerTraining, TransformerTraining)

_INTERRUPTED = 130


def options_from_recipe(
    cls: type[RecipeT], arguments: list[str]
) -> tuple[str | None, str | None, RecipeT, list[str]]:
    """Takes ``--recipe`` and ``--preset`` off the arguments.

    Returns:
        Both names, the recipe that they amount to, and the other arguments.

    Raises:
        FileNotFoundError: the recipe's file does not exist.
        InputError: there is no such recipe or preset, or the recipe does not fit.
    """
    recipe, rest = _take(arguments, "--recipe")
    preset, rest = _take(rest, "--preset")
    training = cls() if recipe is None else load_recipe(cls, recipe)
    if preset is not None:
        training = dataclasses.replace(training, model=preset_model(cls, preset))
    return recipe, preset, training, rest


def run_training(train: Callable[[], TrainingResult]) -> None:
    """Trains, prints what came out of it, and ends politely on Ctrl-C."""
    from llamagen.support.devices import keep_freed_memory
    from llamagen.training.loop import TrainingInterrupted

    keep_freed_memory()
    try:
        result = train()
    except TrainingInterrupted as stop:
        print(f"llamagen: {stop}", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    if Launch.current().rank > 0:
        # The first process says it for all.
        return
    numbers = {f"training {name}": value for name, value in result.train.items()}
    numbers |= {f"validation {name}": value for name, value in result.validation.items()}
    shown = ("psnr", "codebook_usage", "bits_per_code")
    summary = [
        f"{name.replace('_', ' ')} {value:.4g}"
        for name, value in numbers.items()
        if name.split()[1] in shown
    ]
    print(f"{result.steps} steps in {result.seconds:.0f} s: {', '.join(summary)}")
    if result.skipped:
        print(f"{result.skipped} files could not be read; see {result.out / 'skipped.txt'}")
    print(result.model)


def _take(arguments: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of ``flag``, as ``--flag value`` or ``--flag=value``, and the other arguments."""
    value, rest = None, []
    remaining = iter(arguments)
    for word in remaining:
        if word == flag:
            value = next(remaining, None)
            if value is None or value.startswith("--"):
                raise InputError(f"{flag} needs a value")
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest
