"""Codes that are made when they are asked for are those that a store would have."""

import dataclasses

import numpy as np
import pytest

from llamagen.data.captions import Caption
from llamagen.data.extraction import extract_store
from llamagen.data.images import ImageFolder, SkippedFiles
from llamagen.data.live_codes import LiveCodes
from llamagen.data.views import Views
from llamagen.support.errors import InputError
from tests.data.test_extraction import image_tree
from tests.tiny_models import tiny_tokenizer


def live(images, views, folder):
    return LiveCodes(tiny_tokenizer(), images, views, skipped=SkippedFiles(folder / "skipped.txt"))


@pytest.mark.parametrize("kind", ["center", "flip", "five-crop", "ten-crop"])
def test_matches_a_store(tmp_path, kind):
    images = image_tree(tmp_path / "images")
    views = Views(height=16, width=16, kind=kind)
    store = extract_store(tiny_tokenizer(), images, views, tmp_path / "codes").store
    codes = live(images, views, tmp_path)
    assert (len(codes), codes.views, codes.grid) == (11, store.views, store.grid)
    assert codes.class_names == store.class_names
    np.testing.assert_array_equal(codes.labels, store.labels)
    rows = codes.readable(np.array([3, 10, 3, 0]))
    np.testing.assert_array_equal(rows, [3, 10, 3, 0])
    for view in range(store.views):
        np.testing.assert_array_equal(codes.rows(rows, view), store.rows(rows, view))
    drawn = np.arange(4) % store.views
    np.testing.assert_array_equal(codes.rows(rows, drawn), store.rows(rows, drawn))


def test_replaces_and_lists_damaged_images(tmp_path):
    images = image_tree(tmp_path / "images")
    for index in (4, 5):
        images.paths[index].write_bytes(b"damaged")
    codes = live(images, Views(height=16, width=16), tmp_path)
    for _ in range(2):
        assert codes.readable(np.array([4, 1, 5])).tolist() == [6, 1, 6]
        assert codes.rows(np.array([6, 1, 6]), 0).shape == (3, 4, 4)
    assert codes.damaged == 2
    assert len((tmp_path / "skipped.txt").read_text().splitlines()) == 2
    for path in images.paths:
        path.write_bytes(b"damaged")
    with pytest.raises(InputError, match="none of the 11 images"):
        live(images, Views(height=16, width=16), tmp_path).readable(np.array([0]))


def test_identity_changes_with_the_views(tmp_path):
    images = image_tree(tmp_path / "images")
    one = live(images, Views(height=16, width=16), tmp_path)
    again = live(ImageFolder.scan(tmp_path / "images"), Views(height=16, width=16), tmp_path)
    other = live(images, Views(height=16, width=16, kind="flip"), tmp_path)
    assert one.identity == again.identity != other.identity


def test_identity_changes_with_content_and_captions(tmp_path):
    images, views = image_tree(tmp_path / "images"), Views(height=16, width=16)
    one = live(images, views, tmp_path).identity
    captions = ((Caption("a caption", 1.0),),) * len(images)
    assert live(dataclasses.replace(images, captions=captions), views, tmp_path).identity != one
    content = images.paths[3].read_bytes()
    images.paths[3].write_bytes(content[:-1] + b"\xff")
    assert live(images, views, tmp_path).identity != one
