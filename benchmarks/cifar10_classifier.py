"""The judge of CIFAR-10 samples: a small residual network, and its training.

It is trained on the training images of a recipe, never on those that the recipe holds out.

Shapes: N images of 32x32 pixels as bytes, K classes, D numbers of a feature.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from llamagen.data.images import ImageCollection
from llamagen.support.devices import find_dtype, keep_freed_memory
from llamagen.support.errors import InputError
from llamagen.support.storage import atomic_file
from llamagen.training.config import TransformerTraining
from llamagen.training.data import Images, find_run_images
from llamagen.training.recipes import load_recipe

RECIPE = "cifar10-transformer"
SIDE = 32
SHIFT = 4
"""Maximum shift in pixels of training images."""
_MEAN, _DEVIATION = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
"""Of the training images' red, green and blue."""
_PART = 500
"""Images of a batch when judging."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of the classifier's training."""

    epochs: int = 14
    batch_size: int = 128
    lr: float = 0.1
    """Maximum for SGD; one cycle, which rises for the first quarter."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class About:
    """Metadata of a classifier's file."""

    classes: tuple[str, ...]
    widths: tuple[int, ...]
    """Channels at 16x16, 8x8 and 4x4."""
    held_out: float
    """Part of the images that it was not trained on."""
    trained_on: str
    """Digest of the set of training images."""
    accuracy: float | None = None
    """On the images held out."""


class Judged(NamedTuple):
    """A classifier's output for images."""

    features: np.ndarray
    """(N, D) float32, pooled; D is the last stage's width."""
    found: np.ndarray
    """(N,) int64, the most likely class."""


def split(folder: Path, fraction: float) -> Images:
    """Return a recipe's training images, and all that it holds out.

    Raises:
        FileNotFoundError: there is no such folder.
        InputError: it has no images, or no classes.
    """
    recipe = load_recipe(TransformerTraining, RECIPE)
    # Without the limit on validations, which read a part of the held-out images.
    images = dataclasses.replace(
        recipe.images, validation_fraction=fraction, max_validation_images=2**62
    )
    recipe = dataclasses.replace(recipe, data=str(folder), images=images)
    return find_run_images(recipe, labelled=True)


def load(images: ImageCollection) -> tuple[np.ndarray, np.ndarray]:
    """Bytes (N, 32, 32, 3) and classes (N,) int64.

    Raises:
        InputError: an image is damaged, or has another size.
    """
    pixels = np.empty((len(images), SIDE, SIDE, 3), np.uint8)
    for index in tqdm(range(len(images)), desc="reading", disable=None, leave=False):
        image = images.read(index)
        if image.size != (SIDE, SIDE):
            raise InputError(
                f"{images.key(index)} in {images.name} has {image.width}x{image.height} pixels, "
                f"expected {SIDE}x{SIDE}"
            )
        pixels[index] = image
    return pixels, np.array(images.labels, np.int64)


class Classifier(nn.Module):
    """Three stages of convolutions, each at half the resolution of the one before."""

    def __init__(self, about: About) -> None:
        super().__init__()
        self.about = about
        first, *rest = about.widths
        # Blocks of 2x2 pixels become channels at once: layers at full resolution took a third of
        # the time on a CPU.
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), *_convolution(12, first), nn.ReLU())
        self.blocks = nn.ModuleList(_Block(width) for width in about.widths[:-1])
        self.downs = nn.ModuleList(_down(a, b) for a, b in zip(about.widths, rest, strict=False))
        self.head = nn.Linear(about.widths[-1], len(about.classes))
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(_DEVIATION).view(1, 3, 1, 1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, images: Tensor) -> Tensor:
        """Bytes (N, 3, 32, 32) to float32 (N, D)."""
        x = ((images - self.mean) / self.deviation).contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        for block, down in zip(self.blocks, self.downs, strict=True):
            x = down(block(x))
        return x.float().mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Bytes (N, 3, 32, 32) to logits (N, K)."""
        logits: Tensor = self.head(self.features(images))
        return logits

    @torch.inference_mode()
    def judge(self, images: np.ndarray) -> Judged:
        """Bytes (N, 32, 32, 3) to features and classes.

        In float32, so that they do not depend on the machine's fastest precision.
        """
        self.eval()
        parts = [
            self.features(part.movedim(-1, 1)) for part in torch.from_numpy(images).split(_PART)
        ]
        features = torch.cat(parts)
        return Judged(features.numpy(), self.head(features).argmax(1).numpy())

    def save(self, path: Path) -> None:
        """Write the weights, with ``about`` as the file's metadata."""
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, {"about": json.dumps(dataclasses.asdict(self.about))})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Load a file of ``save``.

        Raises:
            FileNotFoundError: there is no such file.
            InputError: it is no classifier.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; make it with train-classifier")
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            for name in ("classes", "widths"):
                about[name] = tuple(about[name])
            model = cls(About(**about))
            model.load_state_dict(tensors)
        except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise InputError(f"{path} holds no classifier of this script ({error})") from error
        return model.eval()


class _Block(nn.Module):
    """Two convolutions with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [[*_convolution(width, width), nn.ReLU()] for _ in range(2)]
        self.layers = nn.Sequential(*layers[0], *layers[1])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.layers(x)
        return result


def _down(inputs: int, outputs: int) -> nn.Sequential:
    """Halves the resolution."""
    convolution, norm = _convolution(inputs, outputs)
    # Pooling comes before the normalisation, which then has a quarter of the work.
    return nn.Sequential(convolution, nn.MaxPool2d(2), norm, nn.ReLU())


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
    )


def train(
    pixels: np.ndarray, labels: np.ndarray, about: About, training: Training | None = None
) -> Classifier:
    """Train a classifier on images (N, 32, 32, 3) bytes and their classes (N,).

    Raises:
        InputError: there are fewer images than in a batch, or the loss is not finite.
    """
    training = training or Training()
    steps = len(pixels) // training.batch_size
    if steps < 1:
        raise InputError(f"{len(pixels)} images are less than a batch of {training.batch_size}")
    keep_freed_memory()
    dtype = find_dtype("auto", torch.device("cpu"))
    torch.manual_seed(training.seed)
    model = Classifier(about)
    groups = [
        {"params": [x for x in model.parameters() if x.ndim > 1]},
        {"params": [x for x in model.parameters() if x.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(
        groups,
        lr=training.lr,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        training.lr,
        # Its last step may not be its first.
        total_steps=steps * training.epochs + 1,
        pct_start=0.25,
        cycle_momentum=False,
    )
    crops = _Crops(pixels, training.seed)
    targets = torch.from_numpy(labels)
    start = time.perf_counter()
    with tqdm(total=steps * training.epochs, desc="training", disable=None) as bar:
        for epoch in range(training.epochs):
            total = 0.0
            for rows in crops.shuffled().split(training.batch_size)[:steps]:
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    logits = model(crops.take(rows))
                loss = F.cross_entropy(
                    logits.float(), targets[rows], label_smoothing=training.label_smoothing
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item()
                bar.update()
            if not math.isfinite(total):
                raise InputError("the loss is not finite; lower the learning rate")
            bar.write(
                f"epoch {epoch + 1} of {training.epochs}: loss {total / steps:.3f}, "
                f"{time.perf_counter() - start:.0f} s"
            )
    return model.eval()


class _Crops:
    """Batches of images, each shifted and perhaps mirrored."""

    def __init__(self, pixels: np.ndarray, seed: int) -> None:
        edges = ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0))
        padded = torch.from_numpy(np.pad(pixels, edges, mode="reflect")).movedim(-1, 1)
        # (N, 3, 9, 9, 32, 32): every crop, as a view.
        self.windows = padded.unfold(2, SIDE, 1).unfold(3, SIDE, 1)
        self.rng = torch.Generator().manual_seed(seed)

    def shuffled(self) -> Tensor:
        """All rows in random order."""
        return torch.randperm(len(self.windows), generator=self.rng)

    def take(self, rows: Tensor) -> Tensor:
        """Bytes (B, 3, 32, 32)."""
        y, x = torch.randint(2 * SHIFT + 1, (2, len(rows)), generator=self.rng)
        mirrored = torch.rand(len(rows), generator=self.rng) < 0.5
        images = self.windows[rows, :, y, x]
        return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
