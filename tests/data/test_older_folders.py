"""Folders that the first edition wrote are read, and work on them goes on."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llamagen.data.captions import Caption
from llamagen.data.extraction import extract_store
from llamagen.data.store import CodeStore
from llamagen.data.views import Views
from llamagen.text.features import TextStore, extract_text
from tests.data.test_extraction import SIZE, contents, encoded, image_tree
from tests.tiny_models import tiny_text_encoder, tiny_tokenizer

FOLDERS = Path(__file__).parents[1] / "fixtures" / "folders"
CAPTIONS = [f"image {index}" for index in range(5)]
VIEWS = Views(height=SIZE, width=SIZE, kind="flip")


def captioned_images(folder):
    captions = tuple((Caption(text, 1.0),) for text in CAPTIONS)
    return dataclasses.replace(image_tree(folder, count=5), captions=captions)


def same_but_for_the_version(a, b):
    """Whether folders agree, but for the version of the program that finished each."""
    one, other = contents(a), contents(b)
    for each in (one, other):
        values = json.loads(each.pop("manifest.json"))
        values.pop("llamagen")
        each["manifest"] = json.dumps(values).encode()
    return one == other


def test_reads_store_of_codes(tmp_path):
    store = CodeStore.open(FOLDERS / "codes")
    images = captioned_images(tmp_path)
    expected = encoded(tiny_tokenizer(), images, VIEWS)
    for view in (0, 1):
        np.testing.assert_array_equal(store.rows(np.arange(5), view), expected[:, view])
    assert store.labels.tolist() == list(images.labels)
    assert store.captions(range(5)) == list(images.captions)
    store.check_tokenizer(tiny_tokenizer().fingerprint())


@pytest.mark.parametrize("lost", [(), ("shard-00001.json",), ("shard-00000.npy", "captions.bin")])
def test_resumes_extraction(tmp_path, lost):
    folder = shutil.copytree(FOLDERS / "codes", tmp_path / "codes")
    for name in ("manifest.json", *lost):
        (folder / name).unlink()
    images = captioned_images(tmp_path / "images")
    done = extract_store(tiny_tokenizer(), images, VIEWS, folder, shard_size=2)
    assert done.images == (2 if lost else 0)
    assert same_but_for_the_version(folder, FOLDERS / "codes")


def test_reads_and_resumes_text_features(tmp_path):
    encoder = tiny_text_encoder()
    wanted = encoder.encode(CAPTIONS)

    def check(store):
        for found, expected in zip(store.features(CAPTIONS), wanted, strict=True):
            torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)

    check(TextStore.open(FOLDERS / "text"))
    folder = shutil.copytree(FOLDERS / "text", tmp_path / "text")
    for name in ("manifest.json", "shard-00001.json"):
        (folder / name).unlink()
    done = extract_text(encoder, CAPTIONS, folder, shard_size=2)
    assert (done.captions, done.store.identity) == (2, TextStore.open(FOLDERS / "text").identity)
    check(done.store)
