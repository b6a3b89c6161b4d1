"""Trains the small classifier of an evaluation.

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

import llamagen.support.storage as storage
from llamagen.data.order import DataOrder
from llamagen.evaluation.image_sets import ImageSet
from llamagen.evaluation.networks.classifier import (
    Classifier,
    ClassifierConfig,
    save_classifier,
)
from llamagen.support.errors import InputError
from llamagen.support.labels import Labels

_STATE_NAME = ".training.pt"
_SAVED_EVERY = 250
_SEEDS = 1_000_003


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierTraining:
    """How it is trained."""

    steps: int = 2000
    batch_size: int = 128
    lr: float = 2e-3
    """Of AdamW at its highest, on a schedule that rises for the first fifth and falls to zero."""
    weight_decay: float = 0.05
    shift: float = 0.125
    """Images are moved by up to this part of their side."""
    flip: bool = False
    """Mirror every other image; not for digits, letters and the like."""
    label_smoothing: float = 0.1
    held_out: float = 0.1
    """Part of the images that its accuracy is measured on."""
    seed: int = 0


def train_classifier(
    images: ImageSet,
    folder: Path,
    config: ClassifierConfig,
    training: ClassifierTraining | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> Classifier:
    """Trains a classifier into a folder, or goes on where it was interrupted.

    Args:
        images: have labels; all are held in memory, at ``config.size``.
        folder: gets the model's folder; new, empty, or begun by this.
        config: the architecture.
        training: how.
        device: where it is trained.
        progress: is told how many more steps were taken.

    Raises:
        InputError: the images have no classes, or there are too few of them.
    """
    training = training or ClassifierTraining()
    if images.labels is None or len(images.class_names) < 2:
        raise InputError(
            f"{images.name} has no classes to train a classifier on; use class folders"
        )
    storage.require_writable(folder)
    pixels = _read_all(images, config.size)
    labels = torch.from_numpy(images.labels.astype(np.int64))
    order = torch.from_numpy(np.random.default_rng(training.seed).permutation(len(labels)))
    held_out = max(1, round(training.held_out * len(labels)))
    if len(labels) - held_out < config.classes:
        raise InputError(f"{len(labels)} images of {images.name} are too few for a classifier")
    run = _Run(config, training, folder, len(labels) - held_out, device)
    while run.step < training.steps:
        run.train(pixels, labels, order[held_out:], progress)
    accuracy = run.accuracy(pixels, labels, order[:held_out])
    run.model.labels, run.model.accuracy = Labels(images.class_names), accuracy
    save_classifier(run.model, folder)
    (folder / _STATE_NAME).unlink(missing_ok=True)
    return run.model.eval()


class _Run:
    """A training on its way; its state is saved now and then."""

    def __init__(
        self,
        config: ClassifierConfig,
        training: ClassifierTraining,
        folder: Path,
        count: int,
        device: torch.device | str,
    ) -> None:
        self.training, self.device = training, torch.device(device)
        self.path = folder / _STATE_NAME
        with torch.random.fork_rng():
            torch.manual_seed(training.seed)
            self.model = Classifier(config).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=training.lr, weight_decay=training.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            training.lr,
            # Its last step may not be its first.
            total_steps=training.steps + 1,
            pct_start=0.2,
            cycle_momentum=False,
        )
        self.order = DataOrder(
            count=count, batch_size=min(training.batch_size, count), seed=training.seed
        )
        self.step = 0
        self.about: dict[str, Any] = {
            "config": dataclasses.asdict(config),
            "training": dataclasses.asdict(training),
        }
        self._restore(count)

    def _restore(self, count: int) -> None:
        self.about["count"] = count
        if not self.path.is_file():
            return
        state = torch.load(self.path, map_location=self.device, weights_only=True)
        if state["about"] != self.about:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]

    def train(
        self,
        pixels: Tensor,
        labels: Tensor,
        rows: Tensor,
        progress: Callable[[int], object] | None,
    ) -> None:
        """Some steps, after which the state is saved."""
        self.model.train()
        for step in range(self.step, min(self.step + _SAVED_EVERY, self.training.steps)):
            part = rows[[draw.index for draw in self.order.batch(step)]]
            numbers = torch.Generator().manual_seed(self.training.seed * _SEEDS + step)
            images = _augmented(pixels[part], self.training, numbers).to(self.device)
            with _fast(self.device):
                logits = self.model(images.float() / 127.5 - 1.0)
            loss = F.cross_entropy(
                logits.float(),
                labels[part].to(self.device),
                label_smoothing=self.training.label_smoothing,
            )
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.step = step + 1
            if progress is not None:
                progress(1)
        state: dict[str, Any] = {
            "about": self.about,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        with storage.atomic_file(self.path) as temporary:
            torch.save(state, temporary)

    @torch.inference_mode()
    def accuracy(self, pixels: Tensor, labels: Tensor, rows: Tensor) -> float:
        self.model.eval()
        right = sum(
            int((found == labels[part]).sum())
            for part in rows.split(256)
            for found in [
                self.model(self.model.prepare(pixels[part].to(self.device))).argmax(1).cpu()
            ]
        )
        return right / len(rows)


def _read_all(images: ImageSet, side: int) -> Tensor:
    """All images, resized, uint8 (N, 3, side, side)."""
    return torch.cat(list(_resized(images, side)))


def _resized(images: ImageSet, side: int) -> Iterator[Tensor]:
    for part in images.parts():
        pixels = torch.from_numpy(np.array(part)).movedim(-1, 1)
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(
                pixels.float(), size=(side, side), mode="bilinear", antialias=True
            )
        yield pixels.round().clamp(0, 255).to(torch.uint8) if pixels.is_floating_point() else pixels


def _augmented(images: Tensor, training: ClassifierTraining, numbers: torch.Generator) -> Tensor:
    """Images (B, 3, side, side), each moved and perhaps mirrored; edges are repeated."""
    count, _, side, _ = images.shape
    most = round(training.shift * side)
    padded = F.pad(images.float(), (most,) * 4, mode="replicate").to(images.dtype)
    offsets = torch.randint(2 * most + 1, (count, 2), generator=numbers)
    mirrored = (torch.rand(count, generator=numbers) < 0.5) & training.flip
    along = torch.arange(side)
    rows = offsets[:, :1] + along
    columns = offsets[:, 1:] + torch.where(mirrored[:, None], along.flip(0), along)
    each = torch.arange(count)[:, None, None]
    return padded.movedim(1, -1)[each, rows[:, :, None], columns[:, None]].movedim(-1, 1)


def _fast(device: torch.device) -> torch.autocast:
    from llamagen.support.devices import find_dtype

    dtype = find_dtype(None, device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype == torch.bfloat16)
