"""Training of the small classifier of an evaluation.

Shapes: N images of H x W pixels, as uint8.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import llamagen.support.storage as storage
from llamagen.data.loader import DataOrder
from llamagen.evaluation.image_sets import ImageSet
from llamagen.evaluation.networks.classifier import (
    Classifier,
    ClassifierConfig,
    ClassifierFeatures,
    load_classifier,
    save_classifier,
)
from llamagen.models.pretrained import CONFIG_NAME
from llamagen.support import distributed
from llamagen.support.devices import find_dtype
from llamagen.support.errors import InputError
from llamagen.support.labels import Labels

_STATE_NAME = ".training.pt"
_SAVE_EVERY = 250
_SEED_STRIDE = 1_000_003
_MAX_SIDE = 64
"""Larger images are shrunk to this side for the classifier."""


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


def open_classifier(
    folder: Path, images: ImageSet | None, device: torch.device, training: ClassifierTraining
) -> ClassifierFeatures:
    """Return the classifier in a folder, trained on images if it is not there yet.

    Called in every process of a run; the main one trains.

    Raises:
        InputError: there is none, and no images with classes to train it on.
    """
    if distributed.is_main() and not (folder / CONFIG_NAME).is_file() and images is not None:
        config = ClassifierConfig(
            classes=max(2, len(images.class_names)), size=min(_MAX_SIDE, *images.size)
        )
        with tqdm(total=training.steps, desc="training the classifier", disable=None) as bar:
            train_classifier(images, folder, config, training, device=device, progress=bar.update)
    distributed.barrier()
    return ClassifierFeatures(load_classifier(folder, device=device))


def train_classifier(
    images: ImageSet,
    folder: Path,
    config: ClassifierConfig,
    training: ClassifierTraining | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> Classifier:
    """Train a classifier into a folder, or resume its training.

    Args:
        images: with labels; all are held in memory, at ``config.size``.
        folder: gets the model's folder; new, empty, or begun by this.
        config: the architecture.
        training: the settings.
        device: where it is trained.
        progress: called with the number of further steps.

    Raises:
        InputError: the images have no classes, or there are too few of them.
    """
    training, device = training or ClassifierTraining(), torch.device(device)
    if images.labels is None or len(images.class_names) < 2:
        raise InputError(
            f"{images.name} has no classes to train a classifier on; use class folders"
        )
    storage.require_writable(folder)
    pixels = torch.cat(list(_resized(images, config.size)))
    labels = torch.from_numpy(images.labels.astype(np.int64))
    order = torch.from_numpy(np.random.default_rng(training.seed).permutation(len(labels)))
    held_out, rows = order.tensor_split([max(1, round(training.held_out * len(labels)))])
    if len(rows) < config.classes:
        raise InputError(f"{len(labels)} images of {images.name} are too few for a classifier")
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        model = Classifier(config).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.lr, weight_decay=training.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        training.lr,
        # Its last step may not be its first.
        total_steps=training.steps + 1,
        pct_start=0.2,
        cycle_momentum=False,
    )
    batches = DataOrder(
        count=len(rows), batch_size=min(training.batch_size, len(rows)), seed=training.seed
    )
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    about = {
        "config": dataclasses.asdict(config),
        "training": dataclasses.asdict(training),
        "count": len(rows),
    }
    dtype = find_dtype(None, device)
    for step in range(_restored(folder, about, parts, device), training.steps):
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
        if (step + 1) % _SAVE_EVERY == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            with storage.atomic_file(folder / _STATE_NAME) as temporary:
                torch.save({"about": about, "step": step + 1, **state}, temporary)
    model.eval()
    model.labels = Labels(images.class_names)
    model.accuracy = _accuracy(model, pixels[held_out], labels[held_out])
    save_classifier(model, folder)
    (folder / _STATE_NAME).unlink(missing_ok=True)
    return model


def _restored(
    folder: Path, about: dict[str, Any], parts: dict[str, Any], device: torch.device
) -> int:
    """Restore an interrupted training of the same kind; return its number of steps."""
    if not (folder / _STATE_NAME).is_file():
        return 0
    state = torch.load(folder / _STATE_NAME, map_location=device, weights_only=True)
    if state["about"] != about:
        return 0
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])


@torch.inference_mode()
def _accuracy(model: Classifier, pixels: Tensor, labels: Tensor) -> float:
    found = [
        model(model.prepare(part.to(model.device))).argmax(1).cpu() for part in pixels.split(256)
    ]
    return int((torch.cat(found) == labels).sum()) / len(labels)


def _resized(images: ImageSet, side: int) -> Iterator[Tensor]:
    """All images, uint8 (B, 3, side, side) each."""
    for part in images.parts():
        pixels = torch.from_numpy(np.array(part)).movedim(-1, 1)
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(
                pixels.float(), size=(side, side), mode="bilinear", antialias=True
            )
            pixels = pixels.round().clamp(0, 255).to(torch.uint8)
        yield pixels


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
