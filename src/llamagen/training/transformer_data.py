"""The codes that a transformer is trained on: from a store, or made from the run's images."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from llamagen.data.collection import ImageCollection
from llamagen.data.extraction import extract_store
from llamagen.data.images import SkippedFiles
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


class Codes(NamedTuple):
    """What a transformer is trained on."""

    training: CodeSource
    trained: np.ndarray
    """Rows of ``training`` that are trained on."""
    validation: CodeSource
    """May be the same store."""
    validated: np.ndarray
    """Rows of ``validation`` that are validated on; may be empty."""


def find_codes(recipe: TransformerTraining, tokenizer: ImageTokenizer) -> Codes:
    """The codes that the recipe names, or those of its images, which are made if need be.

    The run's folder is begun. To be called in every process.

    Raises:
        FileNotFoundError: a folder does not exist.
        InputError: there are no such codes or images, they have no classes, or they are another
            tokenizer's.
    """
    if recipe.codes is not None:
        return _stored_codes(recipe, recipe.codes, tokenizer)
    images = find_run_images(recipe, labelled=recipe.condition == "class")
    height, width = recipe.images.shape
    tokenizer.config.grid_of(height, width)
    start_run(recipe)
    views = Views(height=height, width=width, kind=recipe.views, crop_ranges=recipe.crop_ranges)
    training: CodeSource
    if recipe.encode == "always":
        training = _live(recipe, tokenizer, images.training, views)
    else:
        training = _extracted(recipe, tokenizer, images.training, views, "training")
    rows = np.arange(len(training))
    if len(images.validation) == 0:
        return Codes(training, rows, training, rows[:0])
    plain = Views(height=height, width=width)
    validation = _extracted(recipe, tokenizer, images.validation, plain, "validation")
    return Codes(training, rows, validation, np.arange(len(validation)))


def _live(
    recipe: TransformerTraining, tokenizer: ImageTokenizer, images: ImageCollection, views: Views
) -> LiveCodes:
    """Codes that are made when they are read, in the run's precision."""
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


def _stored_codes(recipe: TransformerTraining, folder: Path, tokenizer: ImageTokenizer) -> Codes:
    """The codes in a store, and in the one for validation; by default a part is held out."""
    if recipe.data is not None:
        raise InputError("give either images (`data`) or a store of codes (`codes`), not both")
    fingerprint = tokenizer.fingerprint()
    training = CodeStore.open(folder)
    training.check_tokenizer(fingerprint)
    if recipe.validation_codes is None:
        validation = training
        held_out = _held_out(training, recipe.images.validation_fraction)
        trained = np.setdiff1d(np.arange(len(training)), held_out, assume_unique=True)
    else:
        validation = CodeStore.open(recipe.validation_codes)
        validation.check_tokenizer(fingerprint)
        held_out, trained = np.arange(len(validation)), np.arange(len(training))
    # Read now, so that damaged ones leave no run behind.
    for store in (training, validation):
        _ = store.labels, store.captions([0])
    start_run(recipe)
    return Codes(
        training, trained, validation, _thinned(held_out, recipe.images.max_validation_images)
    )


def _held_out(store: CodeStore, fraction: float) -> np.ndarray:
    """Rows of a store that are not trained on: a choice that depends on their keys only."""
    count = min(len(store) - 1, max(1, round(fraction * len(store)))) if fraction > 0 else 0
    keys = store.keys(range(len(store)))
    digests = [hashlib.sha256(key.encode(errors="surrogateescape")).digest() for key in keys]
    chosen = sorted(range(len(store)), key=lambda row: digests[row])[:count]
    return np.array(sorted(chosen), dtype=np.int64)


def _thinned(rows: np.ndarray, limit: int) -> np.ndarray:
    """At most ``limit`` of the rows, evenly spread over all of them."""
    kept = min(limit, len(rows))
    return rows[np.arange(kept) * len(rows) // max(kept, 1)]


def _extracted(
    recipe: TransformerTraining,
    tokenizer: ImageTokenizer,
    images: ImageCollection,
    views: Views,
    name: str,
) -> CodeStore:
    """The codes of images, in the run's folder; every process makes its share of them."""
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
