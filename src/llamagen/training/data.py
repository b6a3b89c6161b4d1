"""Images and codes of a run, divided into training and validation."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from llamagen.data.extraction import extract_store
from llamagen.data.images import ImageCollection, SkippedFiles, split_keys, spread
from llamagen.data.live_codes import CodeSource, LiveCodes
from llamagen.data.loader import DataOrder, ImageBatch, training_batches
from llamagen.data.sources import is_library_source, open_images
from llamagen.data.store import CodeStore
from llamagen.data.views import Augmentation, Views
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.support import content, distributed
from llamagen.support.artifact import OtherSettingsError
from llamagen.support.errors import InputError
from llamagen.training.checkpoint import CHECKPOINTS_NAME, find_checkpoints
from llamagen.training.config import Recipe, TokenizerTraining, TransformerTraining
from llamagen.training.run_folder import SKIPPED_NAME, start_run

if TYPE_CHECKING:
    # At run time only where data is streamed: it needs an optional package.
    from llamagen.data.streaming import ImageStream


class Images(NamedTuple):
    """Images of a run; the two sets have no image in common unless two sources do."""

    training: ImageCollection
    validation: ImageCollection
    """May be empty."""


def find_run_images(recipe: Recipe, *, labelled: bool) -> Images:
    """Find the images of a run, with their classes if ``labelled``; all processes call it.

    Raises FileNotFoundError if a folder does not exist, or InputError if there are none.
    """
    data, source = _named(recipe), recipe.source
    if source.streaming:
        raise InputError("only image tokenizers train on streamed data; leave `streaming` out")
    with distributed.main_first():
        found = open_images(data, source, labelled=labelled)
    if labelled and found.labels is None:
        raise InputError(
            f"the images in {data} have no classes; put the images of each class into a subfolder "
            f"of its name, or name the column of the classes with `label_column`"
        )
    if isinstance(recipe, TransformerTraining) and not labelled and found.captions is None:
        raise InputError(
            f"the images in {data} have no captions; add a metadata.csv with the columns file_name "
            f"and text, or name the column of captions with `caption_columns`"
        )
    if recipe.validation_data is None and source.validation_split is None:
        found, held_out = found.split(recipe.images.validation_fraction)
    else:
        with distributed.main_first():
            held_out = open_images(
                recipe.validation_data or data,
                source,
                split=source.validation_split,
                labelled=labelled,
                class_names=found.class_names if labelled else None,
            )
    return Images(found, held_out.thinned(recipe.images.max_validation_images))


def _named(recipe: Recipe) -> str:
    if recipe.data is not None:
        return recipe.data
    raise InputError(
        "no images were named; give `data` a folder, Parquet or tar files, or hf:owner/name"
    )


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """Images in a random order that is a function of the step; used as an ``ImageStream``."""

    images: ImageCollection
    order: DataOrder

    def training_batches(self, augmentation: Augmentation, **part: Any) -> Iterator[ImageBatch]:
        """See ``llamagen.data.loader.training_batches``."""
        return training_batches(self.images, self.order, augmentation, **part)

    def digest(self) -> str:
        """See ``ImageCollection``."""
        return self.images.digest()

    def content_digest(self) -> str:
        """See ``ImageCollection``."""
        return self.images.content_digest()

    def state_dict(self) -> dict[int, tuple[int, ...]]:
        """Return this process's position beyond the number of the step: none."""
        return {}

    def load_state_dict(self, state: Mapping[int, Any]) -> None:
        """Continue from what the processes' ``state_dict`` returned."""


class TokenizerImages(NamedTuple):
    """Images that an image tokenizer is trained and validated on."""

    training: Shuffled | ImageStream
    validation: ImageCollection
    """May be empty."""
    shown: ImageCollection
    """Images for sheets of samples."""

    @property
    def identity(self) -> dict[str, str]:
        """Digests of the images, which must not change when a run resumes.

        All processes ask for them.
        """
        sets = {"training": self.training, "validation": self.validation}
        # The others then find what the first has looked at.
        with distributed.main_first():
            return {
                f"the set of {name} images": content.identity(one.digest(), one.content_digest())
                for name, one in sets.items()
            }


def tokenizer_images(recipe: TokenizerTraining) -> TokenizerImages:
    """Find the images of a tokenizer's run; all processes call it.

    Raises as ``find_run_images`` does, and InputError if streamed data has no validation.
    """
    if recipe.source.streaming:
        return _streamed(recipe)
    images, loop = find_run_images(recipe, labelled=False), recipe.loop
    order = DataOrder(count=len(images.training), batch_size=loop.batch_size, seed=loop.seed)
    shown = images.validation if len(images.validation) else images.training
    return TokenizerImages(Shuffled(images.training, order), images.validation, shown)


def _streamed(recipe: TokenizerTraining) -> TokenizerImages:
    from llamagen.data.datasets_library import InMemory
    from llamagen.data.streaming import ImageStream

    data, source = _named(recipe), recipe.source
    if not is_library_source(data):
        raise InputError(
            f"{data} cannot be streamed; that is for hub data sets, Parquet and tar files"
        )
    order: dict[str, Any] = {"batch_size": recipe.loop.batch_size, "seed": recipe.loop.seed}
    training = ImageStream(data, source, **order)
    limit, name = recipe.images.max_validation_images, source.validation_split
    validation: ImageCollection
    if recipe.validation_data is not None:
        indexed = dataclasses.replace(source, streaming=False)
        with distributed.main_first():
            found = open_images(recipe.validation_data, indexed, split=name, labelled=False)
        validation = found.thinned(limit)
    elif name is not None:
        split = ImageStream(data, source, split=name, **order)
        validation = InMemory(list(split.first_images(limit)), f"{data} {name}")
    else:
        raise InputError(
            "no part of streamed data can be held out; give `validation_split` or `validation_data`"
        )
    return TokenizerImages(training, validation, validation)


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

    Creates the run's folder; all processes call it. Raises as ``find_run_images`` does, and
    InputError if the codes belong to another tokenizer.
    """
    if recipe.codes is not None:
        return _stored_codes(recipe, tokenizer)
    images = find_run_images(recipe, labelled=recipe.condition == "class")
    height, width = recipe.images.shape
    tokenizer.config.grid_of(height, width)
    start_run(recipe)
    center = Views(height=height, width=width)
    views = dataclasses.replace(center, kind=recipe.views, crop_ranges=recipe.crop_ranges)
    training: CodeSource
    if recipe.encode == "once":
        training = _extracted(recipe, tokenizer, images.training, views, "training")
    else:
        is_half = recipe.loop.precision == "bfloat16"
        with distributed.main_first():
            training = LiveCodes(
                tokenizer,
                images.training,
                views,
                skipped=SkippedFiles(recipe.out / SKIPPED_NAME),
                workers=recipe.images.workers,
                encoder=copy.deepcopy(tokenizer).to(torch.bfloat16).eval() if is_half else None,
            )
    rows = np.arange(len(training))
    if len(images.validation) == 0:
        return CodeSplits(training, rows, training, rows[:0])
    validation = _extracted(recipe, tokenizer, images.validation, center, "validation")
    return CodeSplits(training, rows, validation, np.arange(len(validation)))


def _extracted(
    recipe: TransformerTraining,
    tokenizer: ImageTokenizer,
    images: ImageCollection,
    views: Views,
    name: str,
) -> CodeSource:
    """Return the codes of images, in the run's folder; every process makes its share of them."""
    folder, begun = recipe.out / "codes" / name, find_checkpoints(recipe.out / CHECKPOINTS_NAME)
    try:
        extraction = extract_store(
            tokenizer,
            images,
            views,
            folder,
            workers=recipe.images.workers,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            # They belong to this run, which keeps them once it has a checkpoint: the images may be
            # restored. With several processes, another may be reading what is there.
            overwrite=distributed.world_size() == 1 and not begun,
            progress=distributed.is_main(),
        )
    except OtherSettingsError as error:
        if not begun:
            raise
        raise InputError(
            f"the images or the image tokenizer are not what the run in {recipe.out} began with "
            f"({error.changes}); restore them, or give another `out` for a new run"
        ) from error
    distributed.barrier()
    return extraction.store or CodeStore.open(folder)


def _stored_codes(recipe: TransformerTraining, tokenizer: ImageTokenizer) -> CodeSplits:
    """Return the codes in a store, and in the one for validation; by default some are held out."""
    if recipe.data is not None:
        raise InputError("give either images (`data`) or a store of codes (`codes`), not both")
    assert recipe.codes is not None
    training = validation = CodeStore.open(recipe.codes)
    train_rows: Sequence[int] = range(len(training))
    if recipe.validation_codes is None:
        fraction = recipe.images.validation_fraction
        train_rows, val_rows = split_keys(training.keys(train_rows), fraction)
    else:
        validation = CodeStore.open(recipe.validation_codes)
        if recipe.condition == "class":
            validation.use_classes(training.class_names)
        val_rows = list(range(len(validation)))
    for store in (training, validation):
        store.check_tokenizer(tokenizer.fingerprint())
        # Read now, so that damaged ones leave no run behind.
        _ = store.labels, store.captions([0])
    start_run(recipe)
    val_rows = [val_rows[i] for i in spread(len(val_rows), recipe.images.max_validation_images)]
    rows, val = (np.array(each, np.int64) for each in (train_rows, val_rows))
    return CodeSplits(training, rows, validation, val)
