"""Folders that the first edition wrote are read, and work on them goes on.

Weights of tiny models are drawn by torch, whose random numbers differ between instruction sets: the
fingerprints here are those of the machine that wrote the folders.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from llamagen.data.captions import Caption
from llamagen.data.extraction import extract_store
from llamagen.data.store import CodeStore
from llamagen.data.views import Views
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.text.encoder import TextEncoder
from llamagen.text.features import TextStore, extract_text
from tests.data.test_extraction import SIZE, contents, image_tree
from tests.tiny_models import tiny_text_encoder, tiny_tokenizer

FOLDERS = Path(__file__).parents[1] / "fixtures" / "folders"
CAPTIONS = [f"image {index}" for index in range(5)]
VIEWS = Views(height=SIZE, width=SIZE, kind="flip")


@pytest.fixture(autouse=True)
def fingerprints_of_the_folders(monkeypatch):
    monkeypatch.setattr(ImageTokenizer, "fingerprint", lambda _: plan("codes", "tokenizer_"))
    monkeypatch.setattr(TextEncoder, "fingerprint", lambda _: plan("text", ""))


def plan(folder, prefix):
    return json.loads((FOLDERS / folder / "plan.json").read_text())[f"{prefix}fingerprint"]


def captioned_images(folder):
    captions = tuple((Caption(text, 1.0),) for text in CAPTIONS)
    return dataclasses.replace(image_tree(folder, count=5), captions=captions)


def interrupted(kind, folder, *lost):
    """A copy of a folder without some of its files."""
    shutil.copytree(FOLDERS / kind, folder)
    for name in ("manifest.json", *lost):
        (folder / name).unlink()
    return contents(folder)


def finished(kind, folder, before):
    """Whether nothing that was there has changed, and all files are there."""
    after = contents(folder)
    return before.items() <= after.items() and after.keys() == contents(FOLDERS / kind).keys()


def test_reads_store_of_codes(tmp_path):
    store = CodeStore.open(FOLDERS / "codes")
    images = captioned_images(tmp_path)
    shards = [np.load(FOLDERS / "codes" / f"shard-0000{i}.npy") for i in range(3)]
    for view in (0, 1):
        expected = np.concatenate(shards)[:, view]
        np.testing.assert_array_equal(store.rows(np.arange(5), view), expected)
    assert (len(store), store.grid, store.codebook_size) == (5, (4, 4), 64)
    assert store.labels.tolist() == list(images.labels)
    assert store.captions(range(5)) == list(images.captions)
    store.check_tokenizer(tiny_tokenizer().fingerprint())


@pytest.mark.parametrize("lost", [(), ("shard-00001.json",), ("shard-00000.npy", "captions.bin")])
def test_resumes_extraction(tmp_path, lost):
    out = tmp_path / "codes"
    before = interrupted("codes", out, *lost)
    images = captioned_images(tmp_path / "images")
    done = extract_store(tiny_tokenizer(), images, VIEWS, out, shard_size=2)
    assert done.images == (2 if lost else 0)
    before.pop("shard-00001.npy" if lost else "", None)
    assert finished("codes", out, before)
    assert done.store.identity == CodeStore.open(FOLDERS / "codes").identity


def test_reads_text_features():
    store = TextStore.open(FOLDERS / "text")
    assert (len(store), store.width, store.text.max_length) == (5, 16, 30)
    assert [len(each) for each in store.features([*CAPTIONS, "other"])] == [8] * 5 + [0]


def test_resumes_text_features(tmp_path):
    before = interrupted("text", tmp_path / "text", "shard-00001.json", "shard-00001.npy")
    done = extract_text(tiny_text_encoder(), CAPTIONS, tmp_path / "text", shard_size=2)
    assert done.captions == 2
    assert finished("text", tmp_path / "text", before)
    assert done.store.identity == TextStore.open(FOLDERS / "text").identity
