"""The codes that a transformer is trained on: from a store, or made from the run's images."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from llamagen.data.extraction import extract_store
from llamagen.data.images import ImageCollection, SkippedFiles, split_keys, spread
from llamagen.data.live_codes import CodeSource, LiveCodes
from llamagen.data.store import CodeStore
from llamagen.data.views import Views
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.support import distributed
from llamagen.support.errors import InputError
from llamagen.training.config import TransformerTraining
from llamagen.training.run_folder import SKIPPED_NAME, start_run
from llamagen.training.sources import find_run_images

CODES_FOLDER = "codes"
"""The codes of the images, in the run's folder."""


class CodeSplits(NamedTuple):
    """Codes that a transformer is trained and validated on."""

    training: CodeSource
    train_rows: np.ndarray
    """Rows of ``training``."""
    validation: CodeSource
    """May be the same store."""
    val_rows: np.ndarray
    """Rows of ``validation``; may be empty."""


def find_codes(recipe: TransformerTraining, tokenizer: ImageTokenizer) -> CodeSplits:
    """Return the codes that the recipe names, or make those of its images if need be.

    Creates the run's folder. To be called in every process.

    Raises:
        FileNotFoundError: a folder does not exist.
        InputError: there are no such codes or images, they have no classes, or the codes belong to
            another tokenizer.
    """
    if recipe.codes is not None:
        return _stored_codes(recipe, recipe.codes, tokenizer)
    images = find_run_images(recipe, labelled=recipe.condition == "class")
    height, width = recipe.images.shape
    tokenizer.config.grid_of(height, width)
    start_run(recipe)
    views = Views(height=height, width=width, kind=recipe.views, crop_ranges=recipe.crop_ranges)
    make = _live if recipe.encode == "always" else _extracted
    training = make(recipe, tokenizer, images.training, views)
    rows = np.arange(len(training))
    if len(images.validation) == 0:
        return CodeSplits(training, rows, training, rows[:0])
    center = Views(height=height, width=width)
    validation = _extracted(recipe, tokenizer, images.validation, center, name="validation")
    return CodeSplits(training, rows, validation, np.arange(len(validation)))


def _live(
    recipe: TransformerTraining, tokenizer: ImageTokenizer, images: ImageCollection, views: Views
) -> CodeSource:
    """Return codes that are made when they are read, in the run's precision."""
    encoder = None
    if recipe.loop.precision == "bfloat16":
        encoder = copy.deepcopy(tokenizer).to(torch.bfloat16).eval()
    return LiveCodes(
        tokenizer,
        images,
        views,
        skipped=SkippedFiles(recipe.out / SKIPPED_NAME),
        workers=recipe.images.workers,
        encoder=encoder,
    )


def _extracted(
    recipe: TransformerTraining,
    tokenizer: ImageTokenizer,
    images: ImageCollection,
    views: Views,
    name: str = "training",
) -> CodeSource:
    """Return the codes of images, in the run's folder; every process makes its share of them."""
    extraction = extract_store(
        tokenizer,
        images,
        views,
        recipe.out / CODES_FOLDER / name,
        workers=recipe.images.workers,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        # They belong to this run. With several processes nothing is deleted behind their backs.
        overwrite=distributed.world_size() == 1,
        progress=distributed.is_main(),
    )
    distributed.barrier()
    return extraction.store or CodeStore.open(recipe.out / CODES_FOLDER / name)


def _stored_codes(
    recipe: TransformerTraining, folder: Path, tokenizer: ImageTokenizer
) -> CodeSplits:
    """Return the codes in a store, and in the one for validation; by default some are held out."""
    if recipe.data is not None:
        raise InputError("give either images (`data`) or a store of codes (`codes`), not both")
    training = CodeStore.open(folder)
    validation = training
    if recipe.validation_codes is None:
        keys = training.keys(range(len(training)))
        train_rows, val_rows = split_keys(keys, recipe.images.validation_fraction)
    else:
        validation = CodeStore.open(recipe.validation_codes)
        train_rows, val_rows = list(range(len(training))), list(range(len(validation)))
    for store in (training, validation):
        store.check_tokenizer(tokenizer.fingerprint())
        # Read now, so that damaged ones leave no run behind.
        _ = store.labels, store.captions([0])
    start_run(recipe)
    chosen = spread(len(val_rows), recipe.images.max_validation_images)
    return CodeSplits(
        training,
        np.array(train_rows, dtype=np.int64),
        validation,
        np.array([val_rows[index] for index in chosen], dtype=np.int64),
    )
