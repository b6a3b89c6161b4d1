"""The small classifier learns, is kept, and goes on where it was interrupted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from llamagen.evaluation.image_sets import CollectedImages
from llamagen.evaluation.networks import classifier as module
from llamagen.evaluation.networks.classifier import (
    ClassifierConfig,
    ClassifierFeatures,
    ClassifierTraining,
    load_classifier,
    train_classifier,
)
from llamagen.support.errors import InputError

SMALL = ClassifierConfig(classes=2, size=8, channels=(8, 16))
QUICK = ClassifierTraining(steps=40, batch_size=16, lr=1e-2)


@pytest.fixture
def images(tmp_path):
    """Noise, brighter on the left in one class and on the right in the other."""
    numbers = np.random.default_rng(0)
    for index in range(60):
        array = numbers.integers(0, 80, (8, 8, 3))
        left = index % 2 == 0
        array[:, :4] += 120 * left
        array[:, 4:] += 120 * (not left)
        path = tmp_path / "images" / ("left" if left else "right") / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array.astype(np.uint8)).save(path)
    return CollectedImages(tmp_path / "images")


def test_learns(images, tmp_path):
    steps = []
    made = train_classifier(images, tmp_path / "c", SMALL, QUICK, progress=steps.append)
    assert len(steps) == QUICK.steps
    assert made.accuracy == 1.0
    loaded = load_classifier(tmp_path / "c")
    assert loaded.fingerprint() == made.fingerprint()
    assert loaded.labels.names == ("left", "right")
    assert ClassifierFeatures(loaded).name.endswith("(2 classes, 100% right on held-out images)")
    assert not list((tmp_path / "c").glob(".*"))
    pixels = torch.from_numpy(images.read(0, 60)).movedim(-1, 1)
    found = ClassifierFeatures(loaded)(pixels)
    assert found.pool.shape == (60, 16)
    assert (found.probabilities.argmax(1).numpy() == images.labels).all()
    # Images of another size are resized first.
    assert ClassifierFeatures(loaded)(pixels.repeat_interleave(2, -1)).pool.shape == (60, 16)


def test_resumes(images, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SAVE_EVERY", 15)
    whole = train_classifier(images, tmp_path / "whole", SMALL, QUICK)

    class Stopping:
        seen = 0

        def __call__(self, step):
            self.seen += step
            if self.seen == 20:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_classifier(images, tmp_path / "c", SMALL, QUICK, progress=Stopping())
    steps = []
    again = train_classifier(images, tmp_path / "c", SMALL, QUICK, progress=steps.append)
    assert len(steps) == 25
    assert again.fingerprint() == whole.fingerprint()


def test_rejects_images_without_classes(images, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (8, 8)).save(flat / "a.png")
    with pytest.raises(InputError, match="has no classes to train a classifier on"):
        train_classifier(CollectedImages(flat), tmp_path / "c", SMALL, QUICK)
