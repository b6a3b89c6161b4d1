"""A small classifier, trained on the reference images, in whose feature space images are compared.

For data that no public network knows, and for machines without Inception's weights. Its distances
are comparable only among evaluations with the very same classifier, and never with a published FID.

Shapes: B images of H x W pixels.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llamagen.support.storage as storage
from llamagen.config import read_json
from llamagen.evaluation.features import NetworkOutput
from llamagen.models.pretrained import CONFIG_NAME, PretrainedModel
from llamagen.support.labels import FILE_NAME, Labels

_MEASURED_NAME = "measured.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Architecture of the classifier."""

    classes: int
    """Number of classes."""
    size: int = 32
    """Side in pixels that images are resized to."""
    channels: tuple[int, ...] = (16, 32, 64, 128)
    """Of the first layer and of each level; each level halves the resolution."""

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"classes is {self.classes}, expected at least 2")
        if self.size < 2 ** (len(self.channels) - 1):
            raise ValueError(f"size {self.size} is too small for {len(self.channels)} levels")


class Classifier(PretrainedModel[ClassifierConfig]):
    """A small residual network; its features are the mean of the last level."""

    config_class = ClassifierConfig
    kind: ClassVar[str] = "classifier"
    labels: Labels | None = None
    accuracy: float | None = None
    """On held-out images, from 0 to 1."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        first, *rest = config.channels
        self.stem = _convolution(3, first)
        self.levels = nn.ModuleList(
            _Level(a, b) for a, b in zip(config.channels, rest, strict=False)
        )
        self.head = nn.Linear(config.channels[-1], config.classes)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to (B, channels)."""
        x = self.stem(images)
        for level in self.levels:
            x = level(x)
        return x.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, size, size) in [-1, 1] to logits (B, classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to float32 (B, 3, size, size) in [-1, 1]."""
        pixels = images.float() / 127.5 - 1.0
        side = self.config.size
        if pixels.shape[-2:] == (side, side):
            return pixels
        return F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)


class ClassifierFeatures:
    """A trained classifier as a ``FeatureNetwork``."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier.eval()
        self.fingerprint = f"classifier {classifier.fingerprint()}"
        accuracy = classifier.accuracy
        known = "" if accuracy is None else f", {accuracy:.0%} right on held-out images"
        self.name = (
            f"classifier trained on the reference ({classifier.config.classes} classes{known})"
        )

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> NetworkOutput:
        """See ``FeatureNetwork``."""
        model = self.classifier
        pool = model.features(model.prepare(images.to(model.device)))
        return NetworkOutput(pool, None, model.head(pool).softmax(1))


def load_classifier(folder: Path, *, device: torch.device | str = "cpu") -> Classifier:
    """Read the files of ``save_classifier``.

    Raises:
        FileNotFoundError: there is no such folder.
        InputError: it holds something else.
    """
    model = Classifier.from_folder(folder, device=device)
    model.labels = Labels.load(folder / FILE_NAME)
    model.accuracy = float(read_json(folder / _MEASURED_NAME)["accuracy"])
    return model.eval()


def save_classifier(model: Classifier, folder: Path) -> None:
    """Write the model, its class names and accuracy; the configuration last."""
    assert model.labels is not None
    with storage.staged_files(folder, last=CONFIG_NAME) as temporary:
        model.save_pretrained(temporary)
        model.labels.save(temporary / FILE_NAME)
        storage.write_json(temporary / _MEASURED_NAME, {"accuracy": model.accuracy})


class _Level(nn.Module):
    """Halves the resolution, then a residual pair of convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down = _convolution(inputs, outputs)
        self.block = nn.Sequential(_convolution(outputs, outputs), _convolution(outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.down(x), 2)
        result: Tensor = x + self.block(x)
        return result


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.GroupNorm(8, outputs), nn.ReLU()
    )
