"""Finding the network that an evaluation compares images with."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from llamagen.evaluation.features import FeatureNetwork, NetworkOutput
from llamagen.evaluation.image_sets import ImageSet
from llamagen.evaluation.networks.classifier import (
    ClassifierConfig,
    ClassifierFeatures,
    load_classifier,
)
from llamagen.evaluation.networks.inception import InceptionV3
from llamagen.evaluation.networks.train_classifier import ClassifierTraining, train_classifier
from llamagen.models.pretrained import CONFIG_NAME
from llamagen.support import distributed

NetworkKind = Literal["inception", "classifier"]

CLASSIFIER_FOLDER = "classifier"
_LARGEST_CLASSIFIER = 64
"""Images are shrunk to this side at most for the classifier."""


class InceptionNetwork:
    """Inception-v3 as a network to compare images with."""

    def __init__(self, model: InceptionV3) -> None:
        self.model = model
        self.name = "Inception-v3 (2015, as FID uses it)"
        self.fingerprint = f"inception {model.fingerprint}"

    def __call__(self, images: Tensor) -> NetworkOutput:
        """See ``FeatureNetwork``."""
        found = self.model(images.to(self.model.device))
        return NetworkOutput(found.pool, found.spatial, found.probabilities)


def open_inception(weights: str | Path | None, device: torch.device) -> FeatureNetwork:
    """Inception-v3; see ``InceptionV3.from_weights``."""
    with distributed.main_first():
        return InceptionNetwork(InceptionV3.from_weights(weights, device=device))


def open_classifier(
    folder: Path, images: ImageSet | None, device: torch.device, training: ClassifierTraining
) -> FeatureNetwork:
    """The classifier in a folder, trained on images if it is not there yet.

    To be called in every process; the main one trains.

    Raises:
        InputError: there is none, and no images with classes to train it on.
    """
    if distributed.is_main() and not (folder / CONFIG_NAME).is_file() and images is not None:
        config = ClassifierConfig(
            classes=max(2, len(images.class_names)), size=min(_LARGEST_CLASSIFIER, *images.size)
        )
        with tqdm(total=training.steps, desc="training the classifier", disable=None) as bar:
            train_classifier(images, folder, config, training, device=device, progress=bar.update)
    distributed.barrier()
    return ClassifierFeatures(load_classifier(folder, device=device))
