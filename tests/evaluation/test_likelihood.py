"""Bits are those of the loss, for each code, with and without the condition."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from llamagen.evaluation import image_sets
from llamagen.evaluation.image_sets import CollectedImages
from llamagen.evaluation.protocols.likelihood import measure_likelihood
from llamagen.models.tokenizer import uint8_to_images
from llamagen.support.errors import InputError
from llamagen.support.labels import Labels
from tests.evaluation.sets import CLASSES, write_noise
from tests.tiny_models import tiny_pipeline, tiny_text_pipeline


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(image_sets, "PIECE", 4)


def test_bits_equal_the_loss(tmp_path):
    pipe = tiny_pipeline()
    images = CollectedImages(write_noise(tmp_path / "a", 10))
    found = measure_likelihood(pipe, images, tmp_path)
    assert found.conditional.shape == (10, 4, 4)
    pixels = torch.from_numpy(images.read(0, 10)).movedim(-1, 1)
    codes = pipe.tokenizer.encode(uint8_to_images(pixels)).flatten(1)
    # The folder's classes are in alphabetical order, the model's are not.
    labels = torch.tensor([pipe.labels.find(images.class_names[i]) for i in images.labels])
    drop = torch.ones(10, dtype=torch.bool)
    with torch.no_grad():
        logits = pipe.transformer(codes[:, :-1], labels)
        loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
        logits = pipe.transformer(codes[:, :-1], labels, drop_condition=drop)
        without = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    assert found.bits_per_code == pytest.approx(float(loss) / math.log(2), rel=1e-5)
    assert found.bits_per_code_unconditional == pytest.approx(
        float(without) / math.log(2), rel=1e-5
    )
    assert found.bits_per_pixel == pytest.approx(found.bits_per_code * 16 / 256)
    np.testing.assert_allclose(found.map().mean(), found.bits_per_code)


def test_classes_are_found_by_name(tmp_path):
    pipe = tiny_pipeline()
    folder = write_noise(tmp_path / "a", 10)
    by_name = measure_likelihood(pipe, CollectedImages(folder), tmp_path / "named").conditional
    # The same classes as numbers that are no indices, of which the data has not all.
    pipe.labels = Labels(tuple("12345"))
    for index, name in enumerate(CLASSES):
        (folder / name).rename(folder / str(index + 1))
    images = CollectedImages(folder)
    numbers = measure_likelihood(pipe, images, tmp_path / "numbered").conditional
    order = [int(images._images.paths[i].stem) for i in range(10)]
    before = sorted(range(10), key=lambda i: (CLASSES[i % 5], i))
    for row, number in enumerate(order):
        expected = by_name[before.index(number)]
        np.testing.assert_allclose(numbers[row], expected, rtol=1e-5, atol=1e-6)
    shutil.rmtree(folder / "1")
    fewer = measure_likelihood(pipe, CollectedImages(folder), tmp_path / "fewer").conditional
    np.testing.assert_allclose(fewer, numbers[2:], rtol=1e-5, atol=1e-6)
    (folder / "2").rename(folder / "0")
    with pytest.raises(InputError, match="a class '0' that the images of tiny do not have"):
        measure_likelihood(pipe, CollectedImages(folder), tmp_path / "l")


def test_resumes(tmp_path, monkeypatch):
    pipe = tiny_pipeline()
    images = CollectedImages(write_noise(tmp_path / "a", 10))
    whole = measure_likelihood(pipe, images, tmp_path / "l")
    (path,) = (tmp_path / "l").rglob("piece-00001.npz")
    path.unlink()
    calls = []
    encode = pipe.tokenizer.encode
    monkeypatch.setattr(pipe.tokenizer, "encode", lambda *given: calls.append(1) or encode(*given))
    again = measure_likelihood(pipe, images, tmp_path / "l")
    assert len(calls) == 1
    np.testing.assert_array_equal(again.conditional, whole.conditional)


def test_other_captions_are_measured_anew(tmp_path):
    write_noise(tmp_path / "a", 2)
    pipe, table = tiny_text_pipeline(), tmp_path / "a" / "metadata.csv"
    found = []
    for text in ("a cat", "a cow"):
        table.write_text(f"file_name,text\ncat/000.png,{text}\ndog/001.png,a dog\n")
        images = CollectedImages(table)
        found.append(measure_likelihood(pipe, images, tmp_path / "l").conditional)
    assert not np.array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_captions_need_no_padding(tmp_path):
    write_noise(tmp_path, 2)
    (tmp_path / "metadata.csv").write_text(
        "file_name,text\ncat/000.png,a cat\ndog/001.png,a much longer dog\n"
    )
    pipe = tiny_text_pipeline()
    images = CollectedImages(tmp_path)
    both = measure_likelihood(pipe, images, tmp_path / "l")
    # Each caption gives what it gives alone, whatever padding the batch needs.
    (tmp_path / "metadata.csv").write_text("file_name,text\ncat/000.png,a cat\n")
    one = CollectedImages(tmp_path)
    alone = measure_likelihood(pipe, one, tmp_path / "l")
    np.testing.assert_allclose(both.conditional[0], alone.conditional[0], rtol=1e-4)
    assert not np.allclose(both.conditional[0], both.unconditional[0])


def test_rejects_images_that_do_not_fit(tmp_path):
    pipe = tiny_pipeline()
    folder = write_noise(tmp_path / "a", 4, side=32)
    with pytest.raises(InputError, match="32x32 pixels, but tiny draws 16x16; crop them with size"):
        measure_likelihood(pipe, CollectedImages(folder), tmp_path / "l")
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (16, 16)).save(flat / "a.png")
    with pytest.raises(InputError, match="has no classes, but tiny draws them"):
        measure_likelihood(pipe, CollectedImages(flat), tmp_path / "l")
    with pytest.raises(InputError, match=r"not every image of .* has a caption"):
        measure_likelihood(tiny_text_pipeline(), CollectedImages(flat), tmp_path / "l")
