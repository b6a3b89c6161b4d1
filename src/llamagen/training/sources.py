"""The images of a run, divided into training and validation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from llamagen.data.columns import SourceConfig
from llamagen.data.images import ImageCollection
from llamagen.data.loader import DataOrder, ImageBatch, training_batches
from llamagen.data.sources import is_library_source, open_images
from llamagen.data.views import Augmentation
from llamagen.support import distributed
from llamagen.support.errors import InputError
from llamagen.training.config import TokenizerTraining, TransformerTraining


class Images(NamedTuple):
    """Images of a run; the two sets have no image in common unless two sources do."""

    training: ImageCollection
    validation: ImageCollection
    """May be empty."""


class TrainingSource(Protocol):
    """A source of batches of images."""

    def training_batches(
        self,
        augmentation: Augmentation,
        *,
        first: int,
        last: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[ImageBatch]:
        """Yield the batches of the steps from ``first`` up to but not including ``last``."""

    def digest(self) -> str:
        """Return a short text that changes when the images do."""

    def state_dict(self) -> dict[int, tuple[int, ...]]:
        """Return the position of this process, beyond the number of the step."""

    def load_state_dict(self, state: Mapping[int, Any]) -> None:
        """Continue from what the processes' ``state_dict`` returned."""


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """Images that can be indexed, in a random order that is a function of the step."""

    images: ImageCollection
    order: DataOrder

    def training_batches(self, augmentation: Augmentation, **part: Any) -> Iterator[ImageBatch]:
        """See ``TrainingSource`` and ``llamagen.data.loader.training_batches``."""
        return training_batches(self.images, self.order, augmentation, **part)

    def digest(self) -> str:
        """Return that of the images."""
        return self.images.digest()

    def state_dict(self) -> dict[int, tuple[int, ...]]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: Mapping[int, Any]) -> None:
        """Do nothing."""


class TokenizerImages(NamedTuple):
    """Images that an image tokenizer is trained and validated on."""

    training: TrainingSource
    validation: ImageCollection
    """May be empty."""
    shown: ImageCollection
    """Images for sheets of samples."""

    @property
    def identity(self) -> dict[str, str]:
        """What must stay the same when a run continues."""
        return {
            "the set of training images": self.training.digest(),
            "the set of validation images": self.validation.digest(),
        }


def tokenizer_images(recipe: TokenizerTraining) -> TokenizerImages:
    """Find the images of a tokenizer's run. To be called in every process.

    Raises:
        FileNotFoundError: a folder does not exist.
        InputError: no images were named, or there are none, or streamed data has no validation.
    """
    if recipe.source.streaming:
        return _streamed(recipe)
    images, loop = find_run_images(recipe, labelled=False), recipe.loop
    order = DataOrder(count=len(images.training), batch_size=loop.batch_size, seed=loop.seed)
    shown = images.validation if len(images.validation) else images.training
    return TokenizerImages(Shuffled(images.training, order), images.validation, shown)


def find_run_images(recipe: TokenizerTraining | TransformerTraining, *, labelled: bool) -> Images:
    """Find the images of a run. To be called in every process.

    Raises:
        FileNotFoundError: a folder does not exist.
        InputError: no images were named, or there are none, or no classes where ``labelled``.
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
        training, held_out = found.split(recipe.images.validation_fraction)
    else:
        names = found.class_names if labelled else None
        training, held_out = found, _validation(recipe, source, labelled, names)
    return Images(training, held_out.thinned(recipe.images.max_validation_images))


def _named(recipe: TokenizerTraining | TransformerTraining) -> str:
    if recipe.data is None:
        raise InputError(
            "no images were named; give `data` a folder, Parquet or tar files, or hf:owner/name"
        )
    return recipe.data


def _validation(
    recipe: TokenizerTraining | TransformerTraining,
    source: SourceConfig,
    labelled: bool,
    class_names: tuple[str, ...] | None,
) -> ImageCollection:
    data, split = recipe.validation_data or _named(recipe), source.validation_split
    with distributed.main_first():
        return open_images(data, source, split=split, labelled=labelled, class_names=class_names)


def _streamed(recipe: TokenizerTraining) -> TokenizerImages:
    from llamagen.data.datasets_library import InMemory
    from llamagen.data.streaming import ImageStream

    data, source = _named(recipe), recipe.source
    if not is_library_source(data):
        raise InputError(
            f"{data} cannot be streamed; that is for hub data sets, Parquet and tar files"
        )
    size, seed = recipe.loop.batch_size, recipe.loop.seed
    training = ImageStream(data, source, batch_size=size, seed=seed)
    limit = recipe.images.max_validation_images
    if recipe.validation_data is not None:
        indexed = dataclasses.replace(source, streaming=False)
        validation = _validation(recipe, indexed, False, None).thinned(limit)
    elif source.validation_split is not None:
        split = ImageStream(data, source, batch_size=size, seed=seed, split=source.validation_split)
        validation = InMemory(list(split.first_images(limit)), f"{data} {source.validation_split}")
    else:
        raise InputError(
            "no part of streamed data can be held out; give `validation_split` or `validation_data`"
        )
    return TokenizerImages(training, validation, validation)
