"""The images of a run: found, named, and divided into training and validation."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from llamagen.data.images import ImageFolder
from llamagen.errors import InputError
from llamagen.training.config import ImageConfig


class Images(NamedTuple):
    """Images of a run; the two sets have no image in common unless two folders do."""

    training: ImageFolder
    validation: ImageFolder
    """May be empty."""

    @property
    def identity(self) -> dict[str, str]:
        """What must stay the same when a run goes on."""
        return {
            "the set of training images": self.training.digest(),
            "the set of validation images": self.validation.digest(),
        }


def find_run_images(
    data: Path | None, validation_data: Path | None, config: ImageConfig, *, labelled: bool
) -> Images:
    """Finds the images of a run.

    Raises:
        FileNotFoundError: a folder does not exist.
        InputError: no folder was named, or there are no images, or no classes where ``labelled``.
    """
    if data is None:
        raise InputError("no images were named; give --data a folder")
    found = ImageFolder.scan(data) if labelled else ImageFolder.scan_unlabelled(data)
    if labelled and found.labels is None:
        raise InputError(
            f"the images in {data} have no classes; put the images of each class into a subfolder "
            f"of its name"
        )
    if validation_data is None:
        training, held_out = found.split(config.validation_fraction)
    elif labelled:
        training = found
        held_out = ImageFolder.scan(validation_data, class_names=found.class_names)
    else:
        training, held_out = found, ImageFolder.scan_unlabelled(validation_data)
    return Images(training, held_out.thinned(config.max_validation_images))
