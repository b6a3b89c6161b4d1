"""A small classifier, trained on the reference images, in whose feature space images are compared.

For data that no public network knows, and for machines without Inception's weights. Its distances
are comparable only among evaluations with the very same classifier, and never with a published FID.

Shapes: B images of H x W pixels.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import llamagen.support.storage as storage
from llamagen.config import read_json
from llamagen.data.loader import DataOrder
from llamagen.evaluation.features import NetworkOutput
from llamagen.evaluation.image_sets import ImageSet
from llamagen.models.pretrained import CONFIG_NAME, PretrainedModel, eval_mode
from llamagen.support import distributed
from llamagen.support.devices import find_dtype
from llamagen.support.errors import InputError
from llamagen.support.labels import FILE_NAME, Labels
from llamagen.support.locks import folder_lock

_MEASURED_NAME = "measured.json"
_STATE_NAME = ".training.pt"
_SAVE_EVERY = 250
"""Steps after which held-out images are looked at, and the training can resume."""
_SAVE_SECONDS = 5.0
_PATIENCE = 4
"""Checks without progress after which the training ends."""
_TIMED_STEPS = 20
"""Steps after which it is known how long all take."""
_SEED_STRIDE = 1_000_003
_MAX_SIDE = 64
"""Larger images are shrunk to this side for the classifier."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Architecture of the classifier."""

    classes: int
    size: int = 32
    """Side in pixels that images are resized to."""
    channels: tuple[int, ...] = (16, 32, 64, 128)
    """Of the first layer and of each level; each level halves the resolution."""

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"classes is {self.classes}, expected at least 2")
        if self.size < 2 ** (len(self.channels) - 1):
            raise ValueError(f"size {self.size} is too small for {len(self.channels)} levels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierTraining:
    """Settings of the training."""

    steps: int = 2000
    batch_size: int = 128
    lr: float = 2e-3
    """Maximum for AdamW, on a schedule that rises for the first fifth and falls to zero."""
    weight_decay: float = 0.05
    shift: float = 0.125
    """Images are shifted by up to this part of their side."""
    flip: bool = False
    """Mirror every other image; not for digits, letters and the like."""
    label_smoothing: float = 0.1
    held_out: float = 0.1
    """Part of the images that its accuracy is measured on."""
    seed: int = 0


class Classifier(PretrainedModel[ClassifierConfig]):
    """A small residual network; its features are the mean of the last level."""

    config_class = ClassifierConfig
    kind: ClassVar[str] = "classifier"
    labels: Labels
    accuracy: float
    """On held-out images, from 0 to 1; like ``labels`` set by training or loading."""
    trained: Mapping[str, Any]
    """Its images and settings; older folders do not have them."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = _convolution(3, config.channels[0])
        self.levels = nn.ModuleList(_Level(a, b) for a, b in itertools.pairwise(config.channels))
        self.head = nn.Linear(config.channels[-1], config.classes)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to (B, channels)."""
        x = self.stem(images)
        for level in self.levels:
            x = level(x)
        return x.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, size, size) in [-1, 1] to logits (B, classes)."""
        return self.head(self.features(images))

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to float32 (B, 3, size, size) in [-1, 1]."""
        return _resized(images.float() / 127.5 - 1.0, self.config.size)


class ClassifierFeatures:
    """A trained classifier as a ``FeatureNetwork``."""

    def __init__(self, classifier: Classifier, trained_on: str = "the reference") -> None:
        self.classifier = classifier.eval()
        self.class_names = classifier.labels.names
        self.fingerprint = f"classifier {classifier.fingerprint()}"
        self.name = (
            f"classifier trained on {trained_on} ({classifier.config.classes} classes, "
            f"{classifier.accuracy:.0%} right on held-out images)"
        )

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> NetworkOutput:
        """See ``FeatureNetwork``."""
        model = self.classifier
        pool = model.features(model.prepare(images.to(model.device)))
        return NetworkOutput(pool, None, model.head(pool))


def load_classifier(folder: Path, *, device: torch.device | str = "cpu") -> Classifier:
    """Read a classifier; FileNotFoundError or InputError if there is none in the folder."""
    model = Classifier.from_folder(folder, device=device)
    model.labels = Labels.load(folder / FILE_NAME)
    measured = read_json(folder / _MEASURED_NAME)
    model.accuracy = float(measured["accuracy"])
    model.trained = measured.get("trained", {})
    return model


def open_classifier(
    folder: Path,
    images: ImageSet | None,
    device: torch.device,
    training: ClassifierTraining,
    *,
    shared: bool = False,
) -> ClassifierFeatures:
    """Return the classifier in a folder, trained on images if it is not there yet.

    Called in every process of a run; the main one trains. InputError if there is none, and no
    images with classes to train it on; or if it was trained on other images or with other settings,
    which only a ``shared`` one may have been.
    """
    if distributed.is_main() and not (folder / CONFIG_NAME).is_file() and images is not None:
        _require_classes(images)
        storage.require_writable(folder)
        config = ClassifierConfig(
            classes=max(2, len(images.class_names)), size=min(_MAX_SIDE, *images.size)
        )
        bar = tqdm(total=training.steps, desc="training the classifier", disable=None)
        # Whoever waits for another run finds its classifier.
        with bar, folder_lock(folder, timeout=math.inf):
            if not (folder / CONFIG_NAME).is_file():
                options: dict[str, Any] = {"device": device, "progress": bar.update}
                train_classifier(images, folder, config, training, **options)
    distributed.barrier()
    model = load_classifier(folder, device=device)
    now = {} if images is None else _trained(images, training)
    if changed := [name for name in now if model.trained.get(name, now[name]) != now[name]]:
        if not shared:
            raise InputError(
                f"the classifier in {folder} was trained with other {' and '.join(changed)}; "
                f"restore that, choose another folder (`out`), or name it as `classifier` to "
                f"compare in its features all the same"
            )
        if "images" in changed:
            return ClassifierFeatures(model, trained_on="other images than the reference")
    return ClassifierFeatures(model)


def _require_classes(images: ImageSet) -> Tensor:
    """Return the labels (N,) of images; InputError if they have none."""
    if images.labels is None or len(images.class_names) < 2:
        raise InputError(
            f"{images.name} has no classes to train a classifier on; use class folders"
        )
    return torch.from_numpy(images.labels.astype(np.int64))


def _trained(images: ImageSet, training: ClassifierTraining) -> dict[str, Any]:
    """Return what a classifier was trained with, for its folder."""
    return {"images": images.identity, "settings": dataclasses.asdict(training)}


def train_classifier(
    images: ImageSet,
    folder: Path,
    config: ClassifierConfig,
    training: ClassifierTraining,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> Classifier:
    """Train a classifier into a folder that is new, empty, or begun by this.

    It ends early once held-out images are recognised no better. All images are held in memory, at
    ``config.size``; ``progress`` is called with the number of further steps. InputError if the
    images have no classes, there are too few of them, or the folder was begun with others.
    """
    labels = _require_classes(images)
    storage.require_writable(folder)
    about = _trained(images, training)
    parts = (torch.from_numpy(np.array(part)).movedim(-1, 1) for part in images.parts())
    small = (_resized(part.float(), config.size).round().clamp(0, 255) for part in parts)
    pixels = torch.cat([part.to(torch.uint8) for part in small])  # (N, 3, size, size)
    order = torch.from_numpy(np.random.default_rng(training.seed).permutation(len(labels)))
    held_out, rows = order.tensor_split([max(1, round(training.held_out * len(labels)))])
    if len(rows) < config.classes:
        raise InputError(f"{len(labels)} images of {images.name} are too few for a classifier")
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        model = Classifier(config).to(device)
    _train(model, pixels, labels, (rows, held_out), folder, training, progress, about)
    model.labels, model.trained = Labels(images.class_names), about
    found = _predict(model.eval(), pixels[held_out]).argmax(1)
    model.accuracy = int((found == labels[held_out]).sum()) / len(held_out)
    with storage.staged_files(folder, last=CONFIG_NAME) as temporary:
        model.save_pretrained(temporary)
        model.labels.save(temporary / FILE_NAME)
        measured = {"accuracy": model.accuracy, "trained": about}
        storage.write_json(temporary / _MEASURED_NAME, measured)
    (folder / _STATE_NAME).unlink(missing_ok=True)
    return model


@torch.inference_mode()
def _predict(model: Classifier, pixels: Tensor) -> Tensor:
    """Return logits (N, classes) of uint8 (N, 3, side, side), on the CPU."""
    with eval_mode(model):
        batches = (part.to(model.device) for part in pixels.split(256))
        return torch.cat([model(model.prepare(batch)).float().cpu() for batch in batches])


def _train(
    model: Classifier,
    pixels: Tensor,
    labels: Tensor,
    split: tuple[Tensor, Tensor],
    folder: Path,
    training: ClassifierTraining,
    progress: Callable[[int], object] | None,
    trained: Mapping[str, Any],
) -> None:
    """Train on some rows, from the step where an interrupted training in the folder stopped.

    ``split`` are those rows and the ones held out.
    """
    rows, held_out = split
    device, dtype = model.device, find_dtype(None, model.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.lr, weight_decay=training.weight_decay
    )
    # Its last step may not be its first.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.lr, training.steps + 1, pct_start=0.2, cycle_momentum=False
    )
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    about = {"config": dataclasses.asdict(model.config), "trained": trained, "count": len(rows)}
    size = min(training.batch_size, len(rows))
    batches = DataOrder(count=len(rows), batch_size=size, seed=training.seed)
    first, losses = _resume(folder, parts, about, device)
    start = saved = time.monotonic()
    timed = min(first + _TIMED_STEPS, training.steps)
    for step in range(first, training.steps):
        if _is_settled(losses):
            _say(f"the classifier no longer improves: its training ends after step {step:,}")
            break
        if step + 1 == timed:
            minutes = (time.monotonic() - start) / (timed - first) * (training.steps - first) / 60
            _say(
                f"training a classifier in {folder}: at most {training.steps - first:,} steps, "
                f"about {minutes:.1f} minutes; the same command goes on after an interruption"
            )
        batch = rows[[sample.index for sample in batches.batch(step)]]
        rng = torch.Generator().manual_seed(training.seed * _SEED_STRIDE + step)
        augmented = _augmented(pixels[batch], training, rng).to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype == torch.bfloat16):
            logits = model(augmented.float() / 127.5 - 1.0)
        loss = F.cross_entropy(
            logits.float(), labels[batch].to(device), label_smoothing=training.label_smoothing
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(1)
        is_check = (step + 1) % _SAVE_EVERY == 0
        if is_check:
            found = _predict(model, pixels[held_out])
            losses.append(float(F.cross_entropy(found, labels[held_out])))
        if is_check or time.monotonic() - saved > _SAVE_SECONDS:
            saved = time.monotonic()
            state = {name: part.state_dict() for name, part in parts.items()}
            with storage.atomic_file(folder / _STATE_NAME) as temporary:
                content = {"about": about, "step": step + 1, "losses": losses, **state}
                torch.save(content, temporary)


def _resume(
    folder: Path, parts: Mapping[str, Any], about: Mapping[str, Any], device: torch.device
) -> tuple[int, list[float]]:
    """Load what an interrupted training saved, if any did; return its steps and checked losses."""
    path = folder / _STATE_NAME
    if not path.is_file():
        return 0, []
    state = torch.load(path, map_location=device, weights_only=True)
    if state["about"] != about:
        raise InputError(
            f"a classifier of other images or settings was begun in {folder}; restore those, or "
            f"delete {path}"
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"]), state["losses"]


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _is_settled(losses: Sequence[float]) -> bool:
    """Whether none of the last checks on held-out images was clearly better than those before."""
    before, last = losses[:-_PATIENCE], losses[-_PATIENCE:]
    return len(before) > 0 and min(last) > 0.99 * min(before)


def _resized(pixels: Tensor, side: int) -> Tensor:
    if pixels.shape[-2:] == (side, side):
        return pixels
    return F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)


def _augmented(images: Tensor, training: ClassifierTraining, rng: torch.Generator) -> Tensor:
    """Images (B, 3, side, side), each shifted and perhaps mirrored; edges are repeated."""
    count, _, side, _ = images.shape
    limit = round(training.shift * side)
    padded = F.pad(images.float(), (limit,) * 4, mode="replicate").to(images.dtype)
    offsets = torch.randint(2 * limit + 1, (count, 2), generator=rng)
    mirrored = (torch.rand(count, generator=rng) < 0.5) & training.flip
    along = torch.arange(side)
    rows = offsets[:, :1] + along
    columns = offsets[:, 1:] + torch.where(mirrored[:, None], along.flip(0), along)
    each = torch.arange(count)[:, None, None]
    return padded.movedim(1, -1)[each, rows[:, :, None], columns[:, None]].movedim(-1, 1)


class _Level(nn.Module):
    """Halves the resolution, then a residual pair of convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down = _convolution(inputs, outputs)
        self.block = nn.Sequential(_convolution(outputs, outputs), _convolution(outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.down(x), 2)
        return x + self.block(x)


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.GroupNorm(8, outputs), nn.ReLU()
    )
