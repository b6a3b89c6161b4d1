"""The store of text features: the same whatever interrupts it, by however many processes."""

import json

import pytest
import torch

from llamagen.support.errors import InputError
from llamagen.text.features import TextStore, extract_text
from tests.tiny_models import tiny_text_encoder

CAPTIONS = [f"{word} {number}" for number in range(4) for word in ("heart", "a llama", "x")]
ODD = ["", "https://example.com"]


@pytest.fixture(scope="module")
def encoder():
    return tiny_text_encoder()


@pytest.fixture
def whole(encoder, tmp_path):
    captions = [*CAPTIONS, *ODD, *CAPTIONS[:3]]
    return extract_text(encoder, captions, tmp_path / "text", shard_size=5)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_stores_true_lengths(encoder, whole):
    store = whole.store
    assert (len(store), whole.captions) == (13, 13)
    manifest = store.manifest
    assert (manifest.empty, manifest.longest) == (1, 10)
    assert manifest.tokens == sum(len(caption) + 1 for caption in CAPTIONS)
    expected = encoder.encode([encoder.prepare(text) for text in CAPTIONS])
    for caption, features, wanted in zip(CAPTIONS, store.features(CAPTIONS), expected, strict=True):
        assert features.dtype == torch.bfloat16
        assert features.shape == (len(caption) + 1, 16)
        torch.testing.assert_close(features.float(), wanted, atol=2e-2, rtol=2e-2)
    missing = store.features(["not there", "https://example.com", "x 0"])
    assert [len(each) for each in missing] == [0, 0, 4]
    assert store.features([]) == []


def test_opens_again(whole, encoder):
    opened = TextStore.open(whole.store.folder)
    assert opened.identity == whole.store.identity
    assert opened.text.max_length == 30
    assert torch.equal(opened.features(["heart 3"])[0], whole.store.features(["heart 3"])[0])


def test_resumes_and_repairs(encoder, whole, tmp_path):
    folder = whole.store.folder
    before = contents(folder)
    for path in (folder / "shard-00001.npy", folder / "shard-00002.json"):
        path.unlink()
    (folder / "shard-00000.npy").write_bytes(before["shard-00000.npy"][:-10])
    with pytest.raises(InputError, match=r"shard-00000\.npy is damaged"):
        TextStore.open(folder)
    captions = [*CAPTIONS, *ODD]
    done = extract_text(encoder, captions, folder, shard_size=5)
    assert done.captions == 13
    assert contents(folder) == before
    assert extract_text(encoder, captions, folder, shard_size=5).captions == 0


def test_ranks_share_the_shards(encoder, whole, tmp_path):
    captions = [*CAPTIONS, *ODD]
    for rank in (1, 0):
        done = extract_text(
            encoder, captions, tmp_path / "b", shard_size=5, rank=rank, world_size=2
        )
        assert (done.store is None) == (rank == 1)
    assert contents(tmp_path / "b") == contents(whole.store.folder)


def test_rejects_other_settings_and_folders(encoder, whole, tmp_path):
    folder = whole.store.folder
    with pytest.raises(InputError, match="another text encoder"):
        extract_text(tiny_text_encoder(seed=1), CAPTIONS, folder, shard_size=5)
    with pytest.raises(InputError, match="other captions"):
        extract_text(encoder, CAPTIONS, folder, shard_size=5)
    low = tiny_text_encoder().to(torch.bfloat16)
    with pytest.raises(InputError, match=r"another precision \(precision float32, now bfloat16"):
        extract_text(low, [*CAPTIONS, ODD[1]], folder, shard_size=5)
    with pytest.raises(InputError, match="no captions to encode"):
        extract_text(encoder, ["", " "], tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="there is no store of text features"):
        TextStore.open(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "file").touch()
    with pytest.raises(InputError, match="not empty"):
        extract_text(encoder, CAPTIONS, tmp_path / "d")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("manifest.json", {"version": 9}, "version 9, this program reads 1"),
        ("manifest.json", {"format": "x"}, "has format 'x'"),
        ("shard-00001.json", {"plan": "x"}, "belongs to another store of text"),
        ("shard-00001.json", {"ends": [1]}, "it has the ends of 1 captions"),
        ("shard-00001.json", {"ends": "x"}, "is damaged"),
        ("index.npy", None, "index.npy is damaged or missing"),
        ("shard-00001.npy", None, "shard-00001.npy is missing"),
        ("manifest.json", None, "not complete"),
    ],
)
def test_rejects_damaged_stores(whole, file, change, message):
    path = whole.store.folder / file
    if change is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((InputError, FileNotFoundError), match=message) as caught:
        TextStore.open(whole.store.folder)
    assert "\n" not in str(caught.value)
