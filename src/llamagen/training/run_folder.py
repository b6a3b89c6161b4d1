"""The folder of a run, marked by ``recipe.yaml``, which holds its complete recipe."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import llamagen.support.storage as storage
from llamagen.config import sampling_settings
from llamagen.support import content, distributed
from llamagen.support.artifact import flattened
from llamagen.support.devices import find_device, find_dtype
from llamagen.support.errors import InputError
from llamagen.support.locks import folder_lock
from llamagen.training.checkpoint import CHECKPOINTS_NAME, find_checkpoints
from llamagen.training.config import Recipe, RecipeT
from llamagen.training.recipes import load_recipe, recipe_to_dict, recipe_to_yaml

RECIPE_NAME = "recipe.yaml"
SKIPPED_NAME = "skipped.txt"
TEXT_ENCODER = "the text encoder"
VALIDATION_CODES = "the validation codes"
_LATE = (TEXT_ENCODER, VALIDATION_CODES)
"""What of a run's data older versions did not record."""

MAY_CHANGE = frozenset(
    {
        # Where things are; that the images and the tokenizer are the same ones is checked apart.
        *("out", "data", "validation_data", "codes", "validation_codes", "text.text_features"),
        *("tokenizer", "images.workers", "loop.device"),
        # Length, logging and validation.
        *("loop.steps", "loop.log_every", "loop.validate_every", "loop.sample_every"),
        *("loop.save_every", "loop.keep_checkpoints", "loop.keep_every", "loop.export"),
        *("loop.resume", "loop.trackers", "loop.max_skipped_steps"),
        *("images.max_validation_images", "sample_images"),
        *(f"sampling.{setting.name}" for setting in sampling_settings()),
        # The same results, computed in another way.
        *("loop.gradient_accumulation", "loop.activation_checkpointing", "loop.compile"),
        *("loop.parallel", "loop.shard_processes"),
    }
)
"""Fields of a recipe that may change when a run is resumed."""


@contextlib.contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Hold the folder of a run during a block, so that no other run works in it.

    It is made for that, and removed if it stays empty. InputError if another run holds it.
    """
    _require_folder(out)
    made = [path for path in (out, *out.parents) if not path.exists()]
    storage.require_writable(out)
    try:
        with folder_lock(out, distributed.rank(), distributed.world_size()):
            yield
    finally:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def open_run(recipe: RecipeT) -> RecipeT:
    """Return ``recipe``, which can start or resume a run in its folder, with a precision chosen.

    A resumed run keeps its own. Nothing is changed. Raises InputError if the folder holds something
    else, or a run that differs in more than ``MAY_CHANGE``, or one that shall not be resumed.
    """
    device, loop = find_device(recipe.loop.device), recipe.loop
    recorded = _recorded(recipe)
    if loop.precision == "auto":
        if recorded is not None:
            precision = recorded.loop.precision
        else:
            # float16 needs scaled gradients.
            is_fast = str(find_dtype("auto", device)) == "torch.bfloat16"
            precision = "bfloat16" if is_fast else "float32"
        # It is measured, so processes might decide differently.
        loop = dataclasses.replace(loop, precision=distributed.gathered(precision)[0])
    recipe = dataclasses.replace(recipe, loop=loop)
    if recorded is not None:
        _check_same(recorded, recipe)
    return recipe


def start_run(recipe: Recipe) -> None:
    """Make the run's folder, if need be, and write the recipe; raise InputError if it cannot be."""
    # All processes have checked the folder by now.
    distributed.barrier()
    if distributed.is_main():
        storage.require_writable(recipe.out)
        storage.write_text(recipe.out / RECIPE_NAME, recipe_to_yaml(recipe))
    distributed.barrier()


def check_same_data(recorded: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Raise InputError if a resumed run has other data than it began with."""
    for name, identity in now.items():
        before = recorded.get(name, identity if name in _LATE else None)
        if not content.is_same(before, identity):
            raise InputError(
                f"{name} is not what the run in {out} began with; restore it, "
                f"or give another `out` for a new run"
            )


def _recorded(recipe: RecipeT) -> RecipeT | None:
    """Return the recipe of the run in the folder, or None if the folder is free."""
    out = recipe.out
    _require_folder(out)
    # Locks and what killed processes leave behind are hidden.
    if not any(out.glob("[!.]*")):
        return None
    path = out / RECIPE_NAME
    if not path.exists():
        raise InputError(f"{out} is not empty and holds no run; give `out` an empty folder")
    if not find_checkpoints(out / CHECKPOINTS_NAME):
        # Nothing to resume, nothing to lose.
        return None
    if not recipe.loop.resume:
        raise InputError(
            f"{out} holds a run already; delete it, give another `out`, or let it go on (`resume`)"
        )
    try:
        return load_recipe(type(recipe), path)
    except InputError as error:
        raise InputError(
            f"{out} holds another kind of run ({error}); give another `out`"
        ) from error


def _require_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give `out` a folder")


def _check_same(recorded: RecipeT, recipe: RecipeT) -> None:
    before, now = flattened(recipe_to_dict(recorded)), flattened(recipe_to_dict(recipe))
    # A cosine ends at the last step: with other steps all learning rates are others.
    fixed = {"loop.steps"} if recipe.loop.schedule == "cosine" else set()
    for name, value in now.items():
        if name not in MAY_CHANGE - fixed and before[name] != value:
            raise InputError(
                f"the run in {recipe.out} began with {name} {before[name]}, now it is {value}; "
                f"restore it, or give another `out` for a new run"
            )
