"""The small classifier learns, is kept, and goes on where it was interrupted."""

from __future__ import annotations

import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor

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
    open_classifier,
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


def interrupted_at(step):
    """A progress callback that stands for Ctrl-C."""
    steps = iter(range(1, step + 1))

    def progress(_):
        if next(steps) == step:
            raise KeyboardInterrupt

    return progress


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

    with pytest.raises(KeyboardInterrupt):
        train_classifier(images, tmp_path / "c", SMALL, QUICK, progress=interrupted_at(20))
    steps = []
    again = train_classifier(images, tmp_path / "c", SMALL, QUICK, progress=steps.append)
    assert len(steps) == 25
    assert again.fingerprint() == whole.fingerprint()


def test_ends_when_it_no_longer_improves(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_SAVE_EVERY", 5)
    still = ClassifierTraining(steps=1000, batch_size=16, lr=1e-12)
    steps = []
    made = train_classifier(images, tmp_path / "c", SMALL, still, progress=steps.append)
    # A first check, and four without progress.
    assert len(steps) == 25
    assert made.accuracy < 1.0
    assert "no longer improves: its training ends after step 25\n" in capsys.readouterr().err
    assert load_classifier(tmp_path / "c").fingerprint() == made.fingerprint()


def test_resumes_between_checks(images, tmp_path, monkeypatch):
    """On slow machines, work is saved after some time, too."""
    monkeypatch.setattr(module, "_SAVE_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(images, tmp_path / "c", SMALL, QUICK, progress=interrupted_at(30))
    steps = []
    again = train_classifier(images, tmp_path / "c", SMALL, QUICK, progress=steps.append)
    assert len(steps) == 11
    whole = train_classifier(images, tmp_path / "whole", SMALL, QUICK)
    assert again.fingerprint() == whole.fingerprint()


def test_says_how_long_it_takes(images, tmp_path, capsys):
    open_classifier(tmp_path / "c", images, torch.device("cpu"), QUICK)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(rf"training a classifier in {tmp_path}/c: at most 40 steps, about 0\.\d", line)
    open_classifier(tmp_path / "c", images, torch.device("cpu"), QUICK)
    assert capsys.readouterr().err == ""


def test_rejects_a_classifier_of_other_images_or_settings(images, tmp_path):
    def opened(images, training=QUICK, **options):
        return open_classifier(tmp_path / "c", images, torch.device("cpu"), training, **options)

    first = opened(images)
    assert "trained on the reference" in first.name
    other = dataclasses.replace(QUICK, steps=41)
    with pytest.raises(InputError, match="was trained with other settings; restore that"):
        opened(images, other)
    path = sorted((tmp_path / "images").rglob("*.png"))[0]
    Image.new("RGB", (8, 8)).save(path)
    changed = CollectedImages(tmp_path / "images")
    with pytest.raises(InputError, match="was trained with other images; restore that"):
        opened(changed)
    # Those who name it compare in its features, whatever with.
    assert opened(images, other, shared=True).name == first.name
    shared = opened(changed, shared=True)
    assert shared.fingerprint == first.fingerprint
    assert "trained on other images than the reference" in shared.name
    # Older folders do not say what it was trained on.
    (tmp_path / "c" / "measured.json").write_text('{"accuracy": 1.0}')
    assert opened(changed).fingerprint == first.fingerprint


def test_rejects_a_folder_begun_with_others(images, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SAVE_EVERY", 5)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(images, tmp_path / "c", SMALL, QUICK, progress=interrupted_at(10))
    other = dataclasses.replace(QUICK, flip=True)
    with pytest.raises(InputError, match="of other images or settings was begun in"):
        train_classifier(images, tmp_path / "c", SMALL, other)


def test_waits_for_another_run_that_trains_it(images, tmp_path, monkeypatch):
    opened = lambda: open_classifier(tmp_path / "c", images, torch.device("cpu"), QUICK)  # noqa: E731
    counts, train = [], module.train_classifier
    monkeypatch.setattr(
        module, "train_classifier", lambda *a, **k: counts.append(1) or train(*a, **k)
    )
    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(opened) for _ in range(2))
        assert first.result().fingerprint == second.result().fingerprint
    assert len(counts) == 1


def test_rejects_images_without_classes(images, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (8, 8)).save(flat / "a.png")
    with pytest.raises(InputError, match="has no classes to train a classifier on"):
        train_classifier(CollectedImages(flat), tmp_path / "c", SMALL, QUICK)
