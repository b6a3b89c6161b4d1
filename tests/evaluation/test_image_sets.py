"""Images to be evaluated are read in pieces from folders and from ADM's files."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from llamagen.evaluation import image_sets
from llamagen.evaluation.image_sets import ArchivedImages, CollectedImages, write_images
from llamagen.support.errors import InputError
from tests.evaluation.sets import CLASSES, noise, write_noise


def test_reads_a_folder_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sets, "_PART", 4)
    images = CollectedImages(write_noise(tmp_path / "a", 10))
    assert (len(images), images.size) == (10, (16, 16))
    assert set(images.class_names) == set(CLASSES)
    parts = list(images.parts())
    assert [len(part) for part in parts] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(parts), images.read(0, 10))
    assert CollectedImages(tmp_path / "a", size=8).size == (8, 8)


def test_identity_changes_with_the_images(tmp_path):
    folder = write_noise(tmp_path / "a", 10)
    before = CollectedImages(folder).identity
    assert CollectedImages(folder).identity == before
    assert CollectedImages(folder, size=8).identity != before
    Image.fromarray(noise(1, 32)[0]).resize((16, 16)).save(
        folder / "cat" / "000.png", optimize=True
    )
    Image.effect_noise((16, 16), 90).convert("RGB").save(folder / "cat" / "000.png")
    assert CollectedImages(folder).identity != before


def test_identity_changes_with_content_of_the_same_size(tmp_path):
    for name, level in (("a", 0), ("b", 0), ("c", 0)):
        Image.new("RGB", (16, 16), (level, 9, 9)).save(tmp_path / f"{name}.bmp")
    before = CollectedImages(tmp_path).identity
    size = (tmp_path / "b.bmp").stat().st_size
    Image.new("RGB", (16, 16), (1, 9, 9)).save(tmp_path / "b.bmp")
    assert (tmp_path / "b.bmp").stat().st_size == size
    assert CollectedImages(tmp_path).identity != before
    Image.new("RGB", (16, 16), (0, 9, 9)).save(tmp_path / "b.bmp")
    assert CollectedImages(tmp_path).identity == before


def test_reads_captions(tmp_path):
    write_noise(tmp_path, 2)
    table = tmp_path / "metadata.csv"
    table.write_text("file_name,text\ncat/000.png,a cat\ndog/001.png,\n")
    images = CollectedImages(table)
    assert images.captions == ("a cat", "")
    # Reports say what was given, and compare by it whether two sets are the same.
    assert images.name == str(table)


def test_rejects_images_of_different_sizes(tmp_path):
    folder = write_noise(tmp_path / "a", 3)
    Image.new("RGB", (20, 16)).save(folder / "cat" / "odd.png")
    with pytest.raises(
        InputError, match=r"20x16 pixels, but .* 16x16; use images of one size, or crop"
    ):
        CollectedImages(folder).read(0, 4)
    assert CollectedImages(folder, size=16).read(0, 4).shape == (4, 16, 16, 3)


def test_rejects_a_damaged_image(tmp_path):
    folder = write_noise(tmp_path / "a", 3)
    (folder / "cat" / "000.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"000.png cannot be read .* repair or remove it"):
        CollectedImages(folder).read(0, 3)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_archives_of_numpy(tmp_path, save):
    save(tmp_path / "a.npz", noise(8))
    images = ArchivedImages(tmp_path / "a.npz")
    assert (len(images), images.size) == (8, (16, 16))
    np.testing.assert_array_equal(images.read(5, 7), noise(8)[5:7])


def test_numpy_reads_our_archives(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sets, "_PART", 3)
    images = CollectedImages(write_noise(tmp_path / "a", 8))
    write_images(tmp_path / "a.npz", images, images.labels)
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], images.read(0, 8))
        np.testing.assert_array_equal(arrays["arr_1"], images.labels)
    np.testing.assert_array_equal(ArchivedImages(tmp_path / "a.npz").read(0, 8), images.read(0, 8))


def test_rejects_bad_archives(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ArchivedImages(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", images=noise(3))
    with pytest.raises(InputError, match=r"no array arr_0 \(but images\)"):
        ArchivedImages(tmp_path / "other.npz")
    np.savez(tmp_path / "floats.npz", noise(3) / 255.0)
    with pytest.raises(InputError, match="expected images: uint8"):
        ArchivedImages(tmp_path / "floats.npz")
    np.savez(tmp_path / "whole.npz", noise(50))
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"no complete \.npz file .* get it again"):
        ArchivedImages(tmp_path / "cut.npz")
    (tmp_path / "cut.npz").write_bytes(content[:2000] + bytes(500) + content[2500:])
    with pytest.raises(InputError, match=r"is damaged .* get it again"):
        ArchivedImages(tmp_path / "cut.npz").read(0, 50)
